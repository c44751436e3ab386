"""How many threads: as many as asked for within bounds, and no more than there is work."""

from __future__ import annotations

import os
import re
import threading

import pytest

from converter import UserError, check, hf_to_mcore, mcore_to_hf, verify
from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
from converter.run import in_threads
from converter.sources import workers_for
from converter.workers import count_workers
from formats.folder import LocalFolder
from formats.location import open_folder
from tests.converter.test_cli import mbconvert
from tests.models import tree


@pytest.mark.parametrize("workers", [0, -1, 257, 100_000])
def test_a_number_out_of_bounds_is_refused_by_every_function(workers):
    message = f"^`workers` is {workers}, which should be 1 to 256$"
    for act in (
        lambda: hf_to_mcore("a", "b", workers=workers), lambda: mcore_to_hf("a", "b", workers=workers),
        lambda: verify("a", "b", workers=workers), lambda: check("a", workers=workers),
        lambda: adapter_to_mcore("a", "b", base="c", workers=workers), lambda: adapter_to_hf("a", "b", workers=workers),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            act()


@pytest.mark.parametrize(("cores", "local", "remote"), [(1, 2, 4), (2, 2, 4), (3, 3, 4), (64, 4, 4)])
def test_unless_told_otherwise_there_are_as_many_as_cores_and_more_where_they_wait_for_the_network(
    monkeypatch, cores, local, remote
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(cores)))
    assert count_workers(None, remote=False) == local
    assert count_workers(None, remote=True) == remote
    assert count_workers(7, remote=False) == 7


def test_a_source_or_a_target_on_the_network_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0, 1})
    local, remote = LocalFolder(tmp_path), open_folder("https://localhost/model")
    assert workers_for(None, [local]) == 2
    assert workers_for(None, [local, remote]) == 4
    assert workers_for(None, [local], "s3://bucket/model") == 4


@pytest.mark.parametrize("command", [("hf-to-mcore", "a", "b"), ("verify", "a", "b")])
def test_the_command_line_says_the_bounds(command):
    done = mbconvert(*command, "--workers", "100000")
    assert done.returncode == 2
    assert re.search(r"'--workers': 100000 is not in the range 1<=x<=256", done.stderr)


@pytest.mark.parametrize(("items", "workers", "most"), [(3, 100, 3), (0, 4, 0), (50, 2, 2)])
def test_no_more_threads_are_started_than_there_are_pieces(items, workers, most):
    started, done = set(), []

    def start():
        started.add(threading.get_ident())
        return done.append

    in_threads(range(items), start, workers=workers)
    assert sorted(done) == list(range(items))
    assert len(started) <= most


def test_an_error_while_work_is_drawn_wakes_those_who_wait():
    """Work that was drawn is done by nobody when the next cannot be drawn: who waits for it must not wait for ever."""
    stopped = threading.Event()

    def items():
        yield 1
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        in_threads(items(), lambda: lambda _: stopped.wait(), workers=4, stop=stopped.set)


def test_a_whole_conversion_has_the_same_bytes_with_the_most_workers(model_folder, tmp_path):
    for workers in (1, 256):
        hf_to_mcore(model_folder("gqa"), tmp_path / str(workers) / "m", tp=2, workers=workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "256")
