"""Ranks wait for the living, name the dead, believe nothing of long ago, and leave nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from formats.errors import UserError
from formats.lock import Holder, lock_path
from formats.rendezvous import Rendezvous

LONG, SHORT = 300.0, 3.0
"""Patience where nobody is to be found dead, and where somebody is: a living process says something 30 times in it."""

ROOT = Path(__file__).parents[2]

RANK = """
import os, sys, threading, time
from pathlib import Path
from formats.errors import UserError
from formats.rendezvous import Rendezvous

folder, rank, size, run_id = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
patience, act = float(sys.argv[5]), sys.argv[6]
partial = folder / "out.partial-1"

def until(name):
    while not (folder / name).exists():
        together.check()
        time.sleep(0.01)

def write():
    if act == "fail":
        raise UserError("`model.safetensors` ends too early")
    if act == "break":
        raise ZeroDivisionError("a bug")
    (partial / f"part-{rank}").write_text(f"of {size}")
    print("wrote", flush=True)
    until("go")
    together.arrive("written", {"rank": rank})
    print("arrived", flush=True)

try:
    with Rendezvous(folder / "out.partial-1.ranks", rank, size, run_id, target=folder / "out", patience=patience) as together:
        print("in", flush=True)
        if rank:
            together.wait("prepared", [0])
            write()
            together.wait("committed", [0])
        else:
            partial.mkdir(exist_ok=True)
            together.arrive("prepared")
            write()
            assert together.wait("written") == [{"rank": each} for each in range(size)]
            print("all", flush=True)
            until("commit")
            partial.rename(folder / "out")
            together.arrive("committed")
except UserError as error:
    sys.exit(f"error: {error}")
assert threading.active_count() == 1
"""


class Rank(subprocess.Popen[str]):
    """One rank's process."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-c", RANK, *map(str, arguments)]
        super().__init__(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def until(self, word: str) -> None:
        """Read until it says a word."""
        while (line := self.stdout.readline()) != f"{word}\n":
            assert line, self.stderr.read()

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said against it."""
        _, errors = self.communicate(timeout=600)
        return self.returncode, errors


@pytest.fixture
def start(tmp_path):
    """Starts the ranks given (all of them) of `size`; ends all processes."""
    started = []

    def run(size, *, only=None, run_id="run", patience=LONG, acts=None):
        numbers = range(size) if only is None else only
        ranks = [Rank(tmp_path, number, size, run_id, patience, (acts or {}).get(number, "")) for number in numbers]
        started.extend(ranks)
        return ranks

    yield run
    for process in started:
        process.kill()
        process.communicate()


def let(folder, *names):
    for name in names:
        (folder / name).touch()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def parts(folder):
    return {path.name: path.read_text() for path in (folder / "out").iterdir()}


def test_all_ranks_end_well_and_leave_nothing_but_the_output(tmp_path, start):
    let(tmp_path, "go", "commit")
    for rank in start(4):
        assert rank.end() == (0, "")
    assert names(tmp_path) == ["commit", "go", "out"]
    assert parts(tmp_path) == {f"part-{rank}": "of 4" for rank in range(4)}


def test_a_killed_rank_is_named_by_the_others_and_another_number_of_ranks_goes_on(tmp_path, start):
    ranks = start(3, patience=SHORT)
    for rank in ranks:
        rank.until("wrote")
    ranks[2].send_signal(signal.SIGKILL)
    for rank in ranks[:2]:
        code, error = rank.end()
        assert code == 1
        assert f"rank `2` (pid `{ranks[2].pid}` on `" in error
        assert "is dead" in error
        assert "--resume" in error
    assert names(tmp_path) == ["out.partial-1"]
    let(tmp_path, "go", "commit")
    assert [rank.end() for rank in start(2)] == [(0, "")] * 2
    assert names(tmp_path) == ["commit", "go", "out"]


def test_a_killed_rank_0_is_named_by_the_others_and_its_lock_recovered(tmp_path, start):
    ranks = start(3, patience=SHORT)
    for rank in ranks:
        rank.until("wrote")
    ranks[0].send_signal(signal.SIGKILL)
    for rank in ranks[1:]:
        code, error = rank.end()
        assert code == 1
        assert f"rank `0` (pid `{ranks[0].pid}` on `" in error
    let(tmp_path, "go", "commit")
    assert [rank.end() for rank in start(4)] == [(0, "")] * 4
    assert names(tmp_path) == ["commit", "go", "out"]


@pytest.mark.parametrize(
    ("failing", "act", "message"),
    [(0, "fail", "ends too early"), (1, "fail", "ends too early"), (2, "break", "ZeroDivisionError")],
)
def test_a_rank_that_fails_stops_the_others_without_waiting_for_silence(tmp_path, start, failing, act, message):
    ranks = start(3, acts={failing: act})
    for number, rank in enumerate(ranks):
        code, error = rank.end()
        assert code == 1
        assert message in error
        if number != failing:
            assert f"rank `{failing}` (pid `{ranks[failing].pid}`" in error
    assert names(tmp_path) == ["out.partial-1"]


def test_a_rank_that_never_starts_is_named(tmp_path, start):
    for rank in start(3, only=[0, 1], patience=SHORT):
        code, error = rank.end()
        assert code == 1
        assert "rank `2`" in error
        assert "never started" in error
    assert not names(tmp_path)


def test_files_of_a_dead_run_of_the_same_name_satisfy_nobody(tmp_path, start):
    ranks = start(3)
    for rank in ranks:
        rank.until("wrote")
    let(tmp_path, "go")
    ranks[0].until("all")
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
        rank.wait()
    dead = tmp_path / "out.partial-1.ranks"
    (token,) = {path.name.split(".")[0] for path in dead.glob("*.written.rank-0.json")}
    (dead / f"{token}.prepared.rank-0.json").rename(dead / f"{token}.committed.rank-0.json")
    (dead / f"{token}.failed.json").write_text('{"text": "a failure of long ago"}')

    (alone,) = start(3, only=[1], patience=SHORT)
    code, error = alone.end()
    assert (code, "rank `0`" in error, "never started" in error) == (1, True, True)
    for rank in start(3, only=[0, 2], patience=SHORT):
        code, error = rank.end()
        assert (code, "rank `1`" in error, "never started" in error) == (1, True, True)
    let(tmp_path, "commit")
    assert [rank.end() for rank in start(3)] == [(0, "")] * 3
    assert names(tmp_path) == ["commit", "go", "out"]


def test_files_that_a_dead_run_of_the_same_name_left_do_not_hinder_the_next(tmp_path, start):
    for _ in range(2):
        ranks = start(3)
        for rank in ranks:
            rank.until("wrote")
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
            rank.wait()
    let(tmp_path, "go", "commit")
    late = start(3, only=[2, 1])
    time.sleep(0.3)
    assert [rank.end() for rank in start(3, only=[0]) + late] == [(0, "")] * 3
    assert names(tmp_path) == ["commit", "go", "out"]


@pytest.mark.parametrize("run_id", ["run", "another"])
def test_a_second_run_at_once_is_refused_and_harms_nothing(tmp_path, start, run_id):
    first = start(2)
    for rank in first:
        rank.until("wrote")
    second = start(2, patience=SHORT, run_id=run_id)
    code, error = second[0].end()
    assert (code, "another run is writing" in error, f"pid `{first[0].pid}`" in error) == (1, True, True)
    code, error = second[1].end()
    assert (code, "rank `0`" in error) == (1, True)
    let(tmp_path, "go", "commit")
    assert [rank.end() for rank in first] == [(0, "")] * 2
    assert names(tmp_path) == ["commit", "go", "out"]


def test_others_wait_for_rank_0_while_it_watches_an_old_lock(tmp_path, start):
    lock_path(tmp_path / "out").write_bytes(Holder.this("another host's").text(5).replace(b'"place": "', b'"place": "far '))
    let(tmp_path, "go", "commit")
    assert [rank.end() for rank in start(2, patience=SHORT)] == [(0, "")] * 2
    assert names(tmp_path) == ["commit", "go", "out"]


def test_a_rank_that_dies_when_its_work_is_done_does_not_make_the_commit_fail(tmp_path, start):
    ranks = start(3, patience=SHORT)
    let(tmp_path, "go")
    ranks[0].until("all")
    ranks[2].send_signal(signal.SIGKILL)
    let(tmp_path, "commit")
    assert [rank.end() for rank in ranks[:2]] == [(0, "")] * 2
    assert names(tmp_path) == ["commit", "go", "out"]


def test_a_rank_that_slept_too_long_is_dead_to_the_others_and_stops_when_it_wakes(tmp_path, start):
    ranks = start(2, patience=SHORT)
    for rank in ranks:
        rank.until("wrote")
    ranks[1].send_signal(signal.SIGSTOP)
    code, error = ranks[0].end()
    assert (code, "rank `1`" in error) == (1, True)
    ranks[1].send_signal(signal.SIGCONT)
    assert ranks[1].end()[0] == 1
    assert names(tmp_path) == ["out.partial-1"]


def test_one_process_alone_needs_no_file_but_the_lock(tmp_path):
    with Rendezvous(tmp_path / "out.ranks", 0, 1, "alone", target=tmp_path / "out") as together:
        together.arrive("written", {"bytes": 3})
        assert together.wait("written") == [{"bytes": 3}]
        together.check()
        assert names(tmp_path) == ["out.lock"]
    assert not names(tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_what_ranks_left_behind_is_removed_by_one_process_alone(tmp_path, start):
    ranks = start(2)
    for rank in ranks:
        rank.until("wrote")
        rank.send_signal(signal.SIGKILL)
        rank.wait()
    with Rendezvous(tmp_path / "out.partial-1.ranks", 0, 1, "alone", target=tmp_path / "out", patience=SHORT):
        pass
    assert names(tmp_path) == ["out.partial-1"]


def test_who_lost_the_lock_does_not_go_on_and_touches_nothing_of_who_has_it(tmp_path):
    folder, other = tmp_path / "out.ranks", Holder.this("other")

    def lose():
        with Rendezvous(folder, 0, 1, "alone", target=tmp_path / "out") as together:
            folder.mkdir()
            (folder / "roster.json").write_text("{}")
            (tmp_path / "new").write_bytes(other.text(0))
            (tmp_path / "new").rename(lock_path(tmp_path / "out"))
            together.arrive("written")
            together.wait("written")

    with pytest.raises(UserError, match="taken from this run"):
        lose()
    assert names(tmp_path) == ["out.lock", "out.ranks"]
    assert names(folder) == ["roster.json"]
