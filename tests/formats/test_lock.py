"""One run at a time; a dead one's lock is recovered, by exactly one; a living one's never."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from formats.errors import UserError
from formats.heartbeat import Process
from formats.lock import Holder, lock, lock_path

SHORT = 1.0
ROOT = Path(__file__).parents[2]

HOLD = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from formats.errors import UserError
from formats.lock import lock

if sys.argv[3:]:
    os.uname = lambda: SimpleNamespace(nodename=sys.argv[3])
try:
    with lock(Path(sys.argv[1]), run="first", patience=float(sys.argv[2])) as held:
        print("held", flush=True)
        while True:
            held.check()
            time.sleep(0.01)
except UserError as error:
    print(error, flush=True)
"""

RACE = """
import sys
from pathlib import Path
from formats.errors import UserError
from formats.lock import lock

for line in sys.stdin:
    try:
        with lock(Path(line.strip()), run="race", patience=60):
            print("won", flush=True)
            sys.stdin.readline()
    except UserError as error:
        print("refused" if "another run is writing" in str(error) else error, flush=True)
        sys.stdin.readline()
    print("left", flush=True)
"""

WORK = """
import os, sys, time
from pathlib import Path
from formats.errors import UserError
from formats.heartbeat import Process
from formats.lock import lock

target, inside = Path(sys.argv[1]), Path(sys.argv[1] + "-inside")
while True:
    try:
        with lock(target, run="work", patience=2):
            text = inside.read_text().split("|") if inside.exists() else []
            if len(text) == 4 and Process(text[0], int(text[1]), int(text[2]), text[3]).is_alive():
                Path(sys.argv[1] + "-violated").write_text("two at once")
            me = Process.this()
            inside.write_text(f"{me.host}|{me.pid}|{me.started}|{me.pid_scope}")
            with open(sys.argv[1] + "-entered", "a") as log:
                log.write("x")
            inside.unlink()
    except UserError as error:
        assert "another run is writing" in str(error), error
"""


@pytest.fixture
def start():
    """Starts a process that runs a text, in the repository; ends all of them."""
    started = []

    def run(text: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", text, *map(str, arguments)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, bufsize=1))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def say(process, text):
    process.stdin.write(f"{text}\n")
    process.stdin.flush()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def until_it_grows(path):
    """Wait until another line is in a file."""
    before = size(path)
    while size(path) == before:
        time.sleep(0.002)


def size(path):
    return path.stat().st_size if path.exists() else 0


def dead_holder() -> Holder:
    """A holder of this host that is no more: its pid is taken by another process that started later."""
    holder = Holder.this("dead")
    return replace(holder, process=holder.process._replace(started=1))


def elsewhere(holder: Holder | None = None) -> Holder:
    """A holder on another host."""
    holder = holder or Holder.this("far")
    return replace(holder, process=holder.process._replace(host="far-away", pid_scope="another"))


@contextmanager
def beating(path: Path, holder: Holder):
    """A lock file whose heart beats, as another host's would."""
    path.write_bytes(holder.text(0))
    stop = threading.Event()

    def beat():
        count = 0
        while not stop.wait(0.02):
            count += 1
            with path.open("r+b") as file:
                file.write(holder.text(count))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_second_run_is_refused_by_an_error_that_names_the_first(tmp_path, start):
    first = start(HOLD, tmp_path / "out", 60)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run is writing") as caught, lock(tmp_path / "out", run="second"):
        pass
    assert f"pid `{first.pid}` on `{Process.this().host}` since `20" in str(caught.value)
    assert "run `first`" in str(caught.value)


def test_a_lock_leaves_neither_file_nor_thread(tmp_path):
    with lock(tmp_path / "deep" / "out", run="one"):
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.lock"]
    assert not list((tmp_path / "deep").iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_a_stale_lock_of_a_dead_process_is_recovered_at_once(tmp_path, start):
    for reaped in (True, False):
        first = start(HOLD, tmp_path / "out", 600)
        assert first.stdout.readline() == "held\n"
        os.kill(first.pid, signal.SIGKILL)
        if reaped:
            first.wait()
        else:
            os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        with lock(tmp_path / "out", run="second", patience=600):
            assert lock_path(tmp_path / "out").exists()
        assert not list(tmp_path.iterdir())


def test_a_holder_that_is_stopped_is_alive(tmp_path, start):
    first = start(HOLD, tmp_path / "out", 0.1)
    assert first.stdout.readline() == "held\n"
    os.kill(first.pid, signal.SIGSTOP)
    time.sleep(0.2)
    with pytest.raises(UserError, match=str(first.pid)), lock(tmp_path / "out", run="second", patience=0.1):
        pass


def test_a_pid_that_was_given_out_again_is_not_trusted(tmp_path):
    lock_path(tmp_path / "out").write_bytes(dead_holder().text(0))
    assert dead_holder().process.pid == os.getpid()
    with lock(tmp_path / "out", run="second", patience=600):
        pass
    assert not list(tmp_path.iterdir())


def test_a_pid_of_another_host_is_not_trusted(tmp_path):
    far = elsewhere(dead_holder())
    with beating(lock_path(tmp_path / "out"), far):
        with pytest.raises(UserError, match="on `far-away`"), lock(tmp_path / "out", run="second", patience=60):
            pass
        assert Holder.parse(lock_path(tmp_path / "out").read_bytes()) == far


@pytest.mark.parametrize(
    "content",
    [elsewhere().text(7), b"", b"{", bytes(99), dead_holder().text(0)[:50]],
    ids=["another host", "empty", "cut short at once", "zeros", "cut short"],
)
def test_a_lock_whose_heart_stands_still_is_recovered_after_patience(tmp_path, content):
    lock_path(tmp_path / "out").write_bytes(content)
    notes = []
    with lock(tmp_path / "out", run="second", patience=0.4, note=notes.append):
        pass
    assert len(notes) == 1
    assert "watching" in notes[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"packages = []", b'{"version": 1}' * 999])
def test_somebody_elses_file_of_that_name_is_not_taken_for_a_lock(tmp_path, content):
    path = lock_path(tmp_path / "out")
    path.write_bytes(content)
    with pytest.raises(UserError) as caught, lock(tmp_path / "out", run="second", patience=0.4):
        pass
    assert str(caught.value) == (
        f"`{path}` is not a lock file, but the lock of `{tmp_path / 'out'}` needs that name\n\n"
        "hint: move it away, or choose another place"
    )
    assert path.read_bytes() == content


def test_a_holder_that_slept_too_long_learns_that_the_lock_is_not_its_own(tmp_path, start):
    first = start(HOLD, tmp_path / "out", SHORT, "far-away")
    assert first.stdout.readline() == "held\n"
    os.kill(first.pid, signal.SIGSTOP)
    with lock(tmp_path / "out", run="second", patience=SHORT) as held:
        os.kill(first.pid, signal.SIGCONT)
        line = first.stdout.readline()
        assert "was taken from this run" in line
        assert f"pid `{os.getpid()}`" in line
        assert first.wait() == 0
        held.confirm()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_taken_is_not_removed_by_who_lost_it(tmp_path):
    far = elsewhere()
    with lock(tmp_path / "out", run="one") as held:
        (tmp_path / "new").write_bytes(far.text(0))
        (tmp_path / "new").rename(lock_path(tmp_path / "out"))
        held.check()
        with pytest.raises(UserError, match=r"taken from this run by pid .* on `far-away`"):
            held.confirm()
    assert Holder.parse(lock_path(tmp_path / "out").read_bytes()) == far


def test_who_died_while_recovering_a_lock_does_not_bar_it(tmp_path):
    stale, claimant, second = dead_holder(), dead_holder(), dead_holder()
    path = lock_path(tmp_path / "out")
    path.write_bytes(stale.text(3))
    path.with_name(f"{path.name}.{stale.key}").write_bytes(claimant.text(0))
    path.with_name(f"{path.name}.{stale.key}.{claimant.key}").write_bytes(second.text(0))
    path.with_name(f"{path.name}.{dead_holder().key}").write_bytes(second.text(0))
    path.with_name(f"{path.name}.{second.key}.new").write_bytes(b"")
    (tmp_path / "out.lock.txt").write_text("somebody's")
    with lock(tmp_path / "out", run="next", patience=600):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out.lock.txt"]


def test_a_lock_that_another_is_about_to_recover_is_left_to_it(tmp_path):
    stale, claimant = dead_holder(), Holder.this("claimant")
    path = lock_path(tmp_path / "out")
    path.write_bytes(stale.text(3))
    path.with_name(f"{path.name}.{stale.key}").write_bytes(claimant.text(0))
    with pytest.raises(UserError, match="run `claimant`"), lock(tmp_path / "out", run="next", patience=600):
        pass
    assert Holder.parse(path.read_bytes()) == stale


def test_of_several_racing_for_a_stale_lock_exactly_one_wins(tmp_path, start):
    racers = [start(RACE) for _ in range(4)]
    for turn in range(40):
        target = tmp_path / f"out-{turn}"
        if turn % 4:
            lock_path(target).write_bytes(dead_holder().text(turn))
        for racer in random.sample(racers, 4):
            say(racer, target)
        assert sorted(racer.stdout.readline() for racer in racers) == ["refused\n"] * 3 + ["won\n"]
        for racer in racers:
            say(racer, "go")
        assert [racer.stdout.readline() for racer in racers] == ["left\n"] * 4
    assert not list(tmp_path.iterdir())


def test_two_never_hold_it_at_once_though_many_are_killed(tmp_path, start):
    workers = [start(WORK, tmp_path / "out") for _ in range(3)]
    for _ in range(20):
        until_it_grows(tmp_path / "out-entered")
        time.sleep(random.uniform(0.0, 0.05))  # a moment of many
        turn = random.randrange(3)
        kill(workers[turn])
        workers[turn] = start(WORK, tmp_path / "out")
    until_it_grows(tmp_path / "out-entered")
    for worker in workers:
        assert worker.poll() is None
        kill(worker)
    assert not (tmp_path / "out-violated").exists()
    with lock(tmp_path / "out", run="last", patience=1):
        pass
    assert not list(tmp_path.glob("out.lock*"))
