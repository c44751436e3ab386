"""Coordinate several processes that write one output, through files: membership, failures, and progress by stages.

The files are in one directory whose name follows from the output, so that every process finds it. Stale files of earlier runs may
be present, and another run may start at the same time, so file names and run ids are never trusted:

- Every process has a random unique key. It writes the key to its own file (`rank-3.KEY.json`) and rewrites that file as its
  heartbeat.
- Rank 0, once it holds the lock of the target, writes a random token to `roster.json`. A process that repeats the token is alive,
  and rank 0 adds its key to the roster. A process that finds its key on the roster knows that rank 0 is alive.
- Every later file carries this token, so files of earlier runs are ignored.

Rank 0 watches all ranks, the others watch rank 0, so N files are read instead of N². A rank that fails, or rank 0 for a dead
rank, writes the failure to one file that all ranks read. Starting the processes is left to a launcher.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from formats.errors import TransientError, UserError
from formats.faults import fault
from formats.heartbeat import PATIENCE, Heartbeat, Process, StalenessTimer, pauses
from formats.json_objects import parse_json
from formats.lock import Lock, lock

_RESUME = "see why it stopped, then give the same command again with `--resume`"


class Rendezvous:
    """One rank's membership in a run: a context manager, entered when all ranks have joined.

    `directory` is used only for this; rank 0 locks `target` for all. An exception in the block is reported to the other ranks.
    Rank 0 leaves the block after all others have left or died. Every method raises UserError that names the rank, its host and
    pid and the cause, once a rank has failed or has shown no heartbeat for `patience` seconds. With `size` 1 the lock is the only
    file.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        size: int,
        run_id: str,
        *,
        target: Path,
        patience: float = PATIENCE,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._rank, self._size, self._patience, self._note = rank, size, patience, note
        self._directory, self._target, self._run_id = directory, target, run_id
        self._process, self._key = Process.this(), secrets.token_hex(6)
        self._mine = self._rank_file(rank, self._key)
        self._token, self._trusted = "", False  # rank 0's; trusted by others once their key is on the roster
        self._members = dict[int, str]()  # the watched ranks and their keys
        self._watches = dict[int, StalenessTimer]()
        self._heard = dict[int, dict[str, Any]]()  # the last content of each rank's file
        self._own, self._left = dict[str, Mapping[str, Any]](), list[Path]()
        self._beats, self._writing = 0, threading.Lock()
        self._trouble, self._leaving = "", False
        self._lock: Lock | None = None
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as exits:
            exits.callback(self._remove_own_files)
            if self._size > 1:
                exits.enter_context(Heartbeat(self._beat, self._patience))
            if self._rank == 0:
                held = lock(self._target, run=self._run_id, patience=self._patience, note=self._note)
                self._lock = exits.enter_context(held)
                exits.callback(self._remove_all_files)
            exits.push(self._report_exit)
            if self._size > 1:
                self._gather() if self._rank == 0 else self._join()
            self._exits = exits.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exits.__exit__(kind, error, trace)

    def check(self) -> None:
        """Raise UserError if another rank has failed or died, or if the lock is lost. Reads no file: call it often."""
        if self._lock:
            self._lock.check()
        if self._trouble:
            raise TransientError(self._trouble, hint=_RESUME)

    def confirm(self) -> None:
        """Read the lock now, then `check`. Call it before something that cannot be undone."""
        if self._lock:
            self._lock.confirm()
            self.check()

    @property
    def alone(self) -> bool:
        """Is this the only rank?"""
        return self._size == 1

    @property
    def is_first(self) -> bool:
        """Is this rank 0, which prepares and commits?"""
        return self._rank == 0

    def holds(self) -> bool:
        """May this run still write and remove the output? True on ranks without the lock."""
        return self._lock is None or self._lock.is_ours()

    def part[T](self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's share of equal work items."""
        return items[self._rank :: self._size]

    def arrive(self, stage: str, payload: Mapping[str, Any] | None = None) -> None:
        """Announce that this rank has reached `stage` (part of a file name), with a JSON payload."""
        self._own[stage] = payload or {}
        if self._size > 1:
            self._left.append(self._stage_file(stage, self._rank))
            self._write(self._left[-1], self._own[stage], sync=True)

    def wait(self, stage: str, ranks: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """Block until `ranks` (default: all) have reached `stage`; return their payloads.

        Rank 0 confirms the lock at the end, because what it does next cannot be undone. A rank that waits for all must have
        reached the stage itself.
        """
        wanted = list(range(self._size) if ranks is None else ranks)
        payloads: dict[int, dict[str, Any]] = {rank: dict(self._own[stage]) for rank in wanted if rank == self._rank}
        for _ in pauses(self._patience):
            self._look_for_failure()
            known = self._trouble  # before the stage files: a failure after rank 0 was done does not count
            for rank in (rank for rank in wanted if rank not in payloads):
                if (payload := _read(self._stage_file(stage, rank))) is not None:
                    payloads[rank] = payload
            if len(payloads) == len(wanted):
                break
            if known or self._lock:
                self.check()
        self.confirm()
        return [payloads[rank] for rank in wanted]

    def fail(self, message: str) -> None:
        """Stop all other ranks with an error that names this rank. Only the first failure of a run is reported."""
        self._report(f"{_rank_label(self._rank, self._hello())} failed: {message}")

    def _gather(self) -> None:
        """Rank 0: publish the token, and wait until every rank has repeated it."""
        self._token, self._trusted = secrets.token_hex(6), True
        watches = {rank: StalenessTimer(self._patience) for rank in range(1, self._size)}
        self._write_roster()
        for _ in pauses(self._patience):
            hellos = list(self._hellos())
            answers = {hello["rank"]: hello["key"] for hello in hellos if hello["token"] == self._token}
            if new := {rank: key for rank, key in answers.items() if rank in watches.keys() - self._members.keys()}:
                self._watch(new)
                self._write_roster()
            for rank in watches.keys() - self._members.keys():
                if watches[rank].look([hello for hello in hellos if hello["rank"] == rank]):
                    raise self._missing(rank)
            self.check()
            if len(self._members) == len(watches):
                return

    def _write_roster(self) -> None:
        keys = {str(rank): key for rank, key in {0: self._key, **self._members}.items()}
        self._write(self._roster, {"run": self._run_id, "size": self._size, "token": self._token, "keys": keys})

    def _join(self) -> None:
        """Other ranks: repeat the token of rank 0 until the roster has this rank's key."""
        watch = StalenessTimer(self._patience)
        for _ in pauses(self._patience):
            roster = _read(self._roster) or {}
            keys: dict[str, str] = roster["keys"] if self._is_ours(roster) else {}
            noted = keys.get(str(self._rank))
            if noted == self._key:
                self._token, self._trusted = roster["token"], True
                self._watch({0: keys["0"]})
                return
            if keys and roster["token"] != self._token:
                self._token = roster["token"]
                self._write_hello()
            # A rank 0 that has another process for this rank will never add this one.
            strangers = {keys["0"]} if noted else set[str]()
            if watch.look([hello for hello in self._hellos(of="0") if hello["key"] not in strangers]):
                raise self._missing(0)

    def _missing(self, rank: int) -> TransientError:
        return TransientError(
            f"rank `{rank}` of run `{self._run_id}` never started: no sign of it for {self._patience:.0f} s",
            hint="look at its output; all ranks must run the same command on the same file system",
        )

    def _is_ours(self, record: Mapping[str, Any]) -> bool:
        return record.get("run") == self._run_id and record.get("size") == self._size

    def _hellos(self, of: str = "*") -> Iterator[dict[str, Any]]:
        """Yield the files of this run's processes, including those of a dead run with the same id."""
        for path in self._files():
            if path.match(f"rank-{of}.*.json") and (hello := _read(path)) and self._is_ours(hello):
                yield hello

    def _files(self) -> list[Path]:
        try:
            return sorted(self._directory.iterdir())
        except OSError:
            return []

    def _beat(self) -> None:
        self._beats += 1
        self._write_hello()
        if not self._leaving and not self._trouble:
            self._look_for_failure()
            self._look_for_dead()

    def _hello(self) -> dict[str, Any]:
        here = {"host": self._process.host, "pid": self._process.pid, "rank": self._rank}
        return {**here, "run": self._run_id, "size": self._size, "key": self._key, "token": self._token, "beat": self._beats}

    def _write_hello(self) -> None:
        with self._writing:
            self._write(self._mine, self._hello())

    def _watch(self, members: dict[int, str]) -> None:
        self._watches |= {rank: StalenessTimer(self._patience) for rank in members}
        self._heard |= {rank: _read(self._rank_file(rank, key)) or {} for rank, key in members.items()}
        self._members = self._members | members  # a new dict, because the heartbeat thread iterates over the old one

    def _look_for_dead(self) -> None:
        for rank, key in self._members.items():
            beat = _read(self._rank_file(rank, key))
            self._heard[rank] = beat or self._heard[rank]
            if self._watches[rank].look(beat):
                text = f"{_rank_label(rank, self._heard[rank])} is dead: no heartbeat for {self._patience:.0f} s"
                self._trouble = self._trouble or text
                if self._rank == 0:  # every rank detects a dead rank 0 by itself
                    self._report(text)

    def _look_for_failure(self) -> None:
        if self._trusted and not self._trouble and (failure := _read(self._failure)):
            self._trouble = str(failure.get("text"))

    def _report(self, text: str) -> None:
        self._trouble = self._trouble or text
        if not self._trusted:
            return
        with suppress(OSError):
            file = os.open(self._failure, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._left.append(self._failure)
            try:
                os.write(file, json.dumps({"text": text}).encode())
            finally:
                os.close(file)

    def _report_exit(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Report an exception that leaves the block to the other ranks."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._report(f"{_rank_label(self._rank, self._hello())} was stopped")
        elif error and not self._trouble:
            self.fail(str(error.args[0]) if isinstance(error, UserError) else fault(error))
        self._leaving = True

    def _remove_all_files(self) -> None:
        """Rank 0, at the end, lock still held: wait until the others have left, then remove all files but its own heartbeat."""
        end = time.monotonic() + (self._patience / 6 if self._trouble else self._patience)
        for _ in pauses(self._patience):
            gone = [self._is_gone(rank, key) for rank, key in self._members.items()]
            if all(gone) or time.monotonic() > end:
                break
        if self._lock and self._lock.is_ours():  # else the files belong to another run
            for path in self._files():
                with suppress(OSError):
                    if path != self._mine:
                        path.unlink()

    def _is_gone(self, rank: int, key: str) -> bool:
        beat = _read(self._rank_file(rank, key))
        return beat is None or self._watches[rank].look(beat)

    def _remove_own_files(self) -> None:
        """Final cleanup, after the heartbeat has stopped; the last rank removes the empty directory.

        Rank 0 has removed this rank's stage files, unless it left earlier.
        """
        over = (_read(self._roster) or {}).get("token") != self._token
        with suppress(OSError):
            for path in [self._mine, *(self._left if over else [])]:
                path.unlink(missing_ok=True)
            self._directory.rmdir()

    @property
    def _roster(self) -> Path:
        return self._directory / "roster.json"

    @property
    def _failure(self) -> Path:
        return self._directory / f"{self._token}.failed.json"

    def _stage_file(self, stage: str, rank: int) -> Path:
        return self._directory / f"{self._token}.{stage}.rank-{rank}.json"

    def _rank_file(self, rank: int, key: str) -> Path:
        return self._directory / f"rank-{rank}.{key}.json"

    def _write(self, path: Path, record: Mapping[str, Any], *, sync: bool = False) -> None:
        """Write a file atomically; try again if a leaving rank removed the directory meanwhile."""
        data = json.dumps(dict(record)).encode()
        while True:
            self._directory.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                return _write_whole(path, data, sync=sync)


def _write_whole(path: Path, data: bytes, *, sync: bool) -> None:
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    new.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    """Read a file's JSON object; None if it is missing, incomplete, or unreadable for the moment."""
    try:
        return parse_json(path.read_bytes(), source=path.name)
    except (OSError, UserError):
        return None


def _rank_label(rank: int, record: Mapping[str, Any]) -> str:
    return f"rank `{rank}` (pid `{record.get('pid', '?')}` on `{record.get('host', '?')}`)"
