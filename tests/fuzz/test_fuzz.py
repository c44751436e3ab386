"""What was found stays found; and some new damage at every change. The long run: `python -m tests.fuzz.run`."""

from __future__ import annotations

import itertools

import pytest

from tests.fuzz import bases, guard
from tests.fuzz.run import CORPUS, fuzz, replay
from tests.fuzz.targets import TARGETS

pytestmark = pytest.mark.filterwarnings("ignore")

INPUTS = 50
"""For each reader: as many on a busy machine as on an idle one."""


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_inputs_that_once_did_harm_are_read_right_or_refused(target, tmp_path):
    tally = replay(target, tmp_path, [path.read_bytes() for path in sorted((CORPUS / target.name).glob("*"))])
    assert not tally.findings


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_files_are_read_right_or_refused(target, tmp_path):
    with guard.limited():
        tally = fuzz(target, tmp_path, inputs=INPUTS, seed=0)
    assert not tally.findings
    assert tally.inputs == INPUTS


def test_the_guard_sees_what_no_reader_may_do(tmp_path):
    """The oracle is alive: each of these is caught."""

    def read_elsewhere():
        (tmp_path.parent / "other").open()

    def write_here():
        (tmp_path / "x").write_text("x")

    def run():
        eval("1")

    def hoard():
        return b"x" * (100 << 20)

    for act, kind in ((read_elsewhere, guard.Escaped), (write_here, guard.Escaped), (run, guard.Escaped), (hoard, MemoryError)):
        with pytest.raises(kind):
            guard.refusal(act, tmp_path)
    with pytest.raises(guard.TooSlow), guard.timed(0.05):
        for _ in itertools.repeat(True):  # in Python: a loop in C would not let the signal in
            pass
    assert bases.one_file()
