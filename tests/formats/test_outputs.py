"""What is called beside a write: while it goes on, with the errors of both."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Event

import numpy as np
import pytest

from formats.outputs import LocalOutputs, alongside

SECONDS = 30
"""No wait here takes long, unless one of both is not called beside the other."""


@pytest.fixture
def pool():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_both_go_on_at_the_same_time(pool):
    called, written = Event(), Event()

    def act(name):
        called.set()
        assert name == "file"
        assert written.wait(SECONDS)

    with alongside(pool, act, "file"):
        assert called.wait(SECONDS)
        written.set()


def test_an_error_of_what_is_called_is_raised_after_the_block(pool):
    done = False
    with pytest.raises(ValueError, match="in the hash"), alongside(pool, fail, "in the hash"):
        done = True
    assert done


def test_an_error_in_the_block_is_raised_while_the_other_still_waits(pool):
    failed = Event()
    with pytest.raises(ValueError, match="in the block"), alongside(pool, failed.wait, SECONDS):
        fail("in the block")
    failed.set()


@pytest.mark.parametrize("size", [1000, 200_000])
def test_a_write_passes_its_bytes_on_and_raises_what_comes_of_it(tmp_path, size):
    data, passed = np.arange(size, dtype=np.uint16), list[tuple[str, int, bytes]]()

    def tap(file, offset, content):
        passed.append((file, offset, bytes(content)))
        if len(passed) == 2:
            fail("in the tap")

    with closing(LocalOutputs(tmp_path)) as outputs:
        outputs.tap = tap
        outputs.write("a", 100, data)
        with pytest.raises(ValueError, match="in the tap"):
            outputs.write("a", 0, data[:50])
    assert passed == [("a", 100, data.tobytes()), ("a", 0, data[:50].tobytes())]
    assert (tmp_path / "a").read_bytes() == data[:50].tobytes() + data.tobytes()


def fail(where):
    raise ValueError(where)
