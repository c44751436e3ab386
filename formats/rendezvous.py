"""Several processes at one output: who takes part, who is dead, who has arrived where. All of it through files.

Knows no tensors and no engine that starts processes. The files lie in one directory, named by what is made, so that every
process finds it; a run of long ago may have left its own there, and another may be trying the same at this moment. So
nothing in it is believed for its name or the run it names:

- Every process has a key like no other, says it in a file of its own (`rank-3.KEY.json`), and rewrites that as its heartbeat.
- Rank 0, once it holds the lock of the target, makes a token like no other and calls it out in `roster.json`. Who repeats it
  is alive now: rank 0 adds its key to the roster. Who finds its own key there knows that rank 0 is alive now.
- All else is named by that token. Files of a dead run, even of the same name, satisfy nobody.

Rank 0 watches all, the others watch rank 0: N files to look at, not N². Who fails, or rank 0 for who died, says so in one
file that all look at.
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
    """One rank's part in a run: a context manager, entered when all are there (rank 0) or rank 0 knows of us (others).

    `directory` is for this alone, `target` what rank 0 takes the lock of for all. A block that raises tells the others; one
    that ends well ends rank 0's only when all others have gone, or are dead. Nothing is left then but what the dead left.
    Every method raises UserError naming the rank, where it last ran and what happened, once a rank failed, or was not heard
    of for `patience` seconds. With `size` 1 there is the lock and no other file.
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
        self._mine = self._named(rank, self._key)
        self._token, self._trusted = "", False  # rank 0's; another's may be an old one until its key is on the roster
        self._members = dict[int, str]()  # those we watch, and their keys
        self._watches = dict[int, StalenessTimer]()
        self._heard = dict[int, dict[str, Any]]()  # what each said last
        self._own, self._left = dict[str, Mapping[str, Any]](), list[Path]()
        self._beats, self._writing = 0, threading.Lock()
        self._trouble, self._leaving = "", False
        self._lock: Lock | None = None
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as exits:
            exits.callback(self._vanish)
            if self._size > 1:
                exits.enter_context(Heartbeat(self._beat, self._patience))
            if self._rank == 0:
                held = lock(self._target, run=self._run_id, patience=self._patience, note=self._note)
                self._lock = exits.enter_context(held)
                exits.callback(self._clear)
            exits.push(self._tell)
            if self._size > 1:
                self._gather() if self._rank == 0 else self._join()
            self._exits = exits.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exits.__exit__(kind, error, trace)

    def check(self) -> None:
        """Raise if another rank is known to have failed or died, or the lock to be lost. Costs nothing: call it often."""
        if self._lock:
            self._lock.check()
        if self._trouble:
            raise TransientError(self._trouble, hint=_RESUME)

    def confirm(self) -> None:
        """Look at the lock now, then `check`. For the moment before something that cannot be undone."""
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
        """Is the output still this run's to write and to remove? True of ranks that have no lock."""
        return self._lock is None or self._lock.is_ours()

    def part[T](self, items: Sequence[T]) -> Sequence[T]:
        """This rank's of things that are all alike."""
        return items[self._rank :: self._size]

    def arrive(self, stage: str, payload: Mapping[str, Any] | None = None) -> None:
        """Say that this rank has come to `stage` (part of a file's name), with anything JSON can hold."""
        self._own[stage] = payload or {}
        if self._size > 1:
            self._left.append(self._place(stage, self._rank))
            self._write(self._left[-1], self._own[stage], sync=True)

    def wait(self, stage: str, ranks: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """What each of `ranks` (all of them) said on coming to `stage`, once they have.

        For rank 0 a look at the lock ends it: what it does next may not be undone. A rank that waits for all was there itself.
        """
        wanted = list(range(self._size) if ranks is None else ranks)
        found: dict[int, dict[str, Any]] = {rank: dict(self._own[stage]) for rank in wanted if rank == self._rank}
        for _ in pauses(self._patience):
            self._look_for_failure()
            known = self._trouble  # trouble that came after rank 0 was done is none: so look for it first
            for rank in (rank for rank in wanted if rank not in found):
                if (payload := _read(self._place(stage, rank))) is not None:
                    found[rank] = payload
            if len(found) == len(wanted):
                break
            if known or self._lock:
                self.check()
        self.confirm()
        return [found[rank] for rank in wanted]

    def fail(self, message: str) -> None:
        """Make all others stop with an error that names this rank. Only the first failure of a run is told."""
        self._report(f"{_who(self._rank, self._hello())} failed: {message}")

    def _gather(self) -> None:
        """Rank 0: call, and wait until every rank has answered."""
        self._token, self._trusted = secrets.token_hex(6), True
        watches = {rank: StalenessTimer(self._patience) for rank in range(1, self._size)}
        self._call()
        for _ in pauses(self._patience):
            hellos = list(self._hellos())
            answers = {hello["rank"]: hello["key"] for hello in hellos if hello["token"] == self._token}
            if new := {rank: key for rank, key in answers.items() if rank in watches.keys() - self._members.keys()}:
                self._watch(new)
                self._call()
            for rank in watches.keys() - self._members.keys():
                if watches[rank].look([hello for hello in hellos if hello["rank"] == rank]):
                    raise self._missing(rank)
            self.check()
            if len(self._members) == len(watches):
                return

    def _call(self) -> None:
        keys = {str(rank): key for rank, key in {0: self._key, **self._members}.items()}
        self._write(self._roster, {"run": self._run_id, "size": self._size, "token": self._token, "keys": keys})

    def _join(self) -> None:
        """Another: repeat what rank 0 calls, until it has taken note of us."""
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
                self._say()
            # A rank 0 that has another process in our place will never take note of us, however alive it is.
            strangers = {keys["0"]} if noted else set[str]()
            if watch.look([hello for hello in self._hellos(of="0") if hello["key"] not in strangers]):
                raise self._missing(0)

    def _missing(self, rank: int) -> TransientError:
        return TransientError(
            f"rank `{rank}` of run `{self._run_id}` never started: not heard of in {self._patience:.0f} s",
            hint="see what it says, and that all ranks run the same command and see the same file system",
        )

    def _is_ours(self, said: Mapping[str, Any]) -> bool:
        return said.get("run") == self._run_id and said.get("size") == self._size

    def _hellos(self, of: str = "*") -> Iterator[dict[str, Any]]:
        """What the processes of this run say; those of a dead one of the same name among them."""
        for path in self._files():
            if path.match(f"rank-{of}.*.json") and (said := _read(path)) and self._is_ours(said):
                yield said

    def _files(self) -> list[Path]:
        try:
            return sorted(self._directory.iterdir())
        except OSError:
            return []

    def _beat(self) -> None:
        self._beats += 1
        self._say()
        if not self._leaving and not self._trouble:
            self._look_for_failure()
            self._look_for_dead()

    def _hello(self) -> dict[str, Any]:
        here = {"host": self._process.host, "pid": self._process.pid, "rank": self._rank}
        return {**here, "run": self._run_id, "size": self._size, "key": self._key, "token": self._token, "beat": self._beats}

    def _say(self) -> None:
        with self._writing:
            self._write(self._mine, self._hello())

    def _watch(self, members: dict[int, str]) -> None:
        self._watches |= {rank: StalenessTimer(self._patience) for rank in members}
        self._heard |= {rank: _read(self._named(rank, key)) or {} for rank, key in members.items()}
        self._members = self._members | members  # a new one: the heart goes through the old one meanwhile

    def _look_for_dead(self) -> None:
        for rank, key in self._members.items():
            said = _read(self._named(rank, key))
            self._heard[rank] = said or self._heard[rank]
            if self._watches[rank].look(said):
                text = f"{_who(rank, self._heard[rank])} is dead: not heard of for {self._patience:.0f} s"
                self._trouble = self._trouble or text
                if self._rank == 0:  # of rank 0 each finds out by itself
                    self._report(text)

    def _look_for_failure(self) -> None:
        if self._trusted and not self._trouble and (said := _read(self._failure)):
            self._trouble = str(said.get("text"))

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

    def _tell(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """The first thing on the way out."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._report(f"{_who(self._rank, self._hello())} was stopped")
        elif error and not self._trouble:
            self.fail(str(error.args[0]) if isinstance(error, UserError) else fault(error))
        self._leaving = True

    def _clear(self) -> None:
        """Rank 0, at the end, lock still held: let the others hear of it, then leave nothing but our own heartbeat."""
        end = time.monotonic() + (self._patience / 6 if self._trouble else self._patience)
        for _ in pauses(self._patience):
            gone = [self._is_gone(rank, key) for rank, key in self._members.items()]
            if all(gone) or time.monotonic() > end:
                break
        if self._lock and self._lock.is_ours():  # else what lies there is already another run's
            for path in self._files():
                with suppress(OSError):
                    if path != self._mine:
                        path.unlink()

    def _is_gone(self, rank: int, key: str) -> bool:
        said = _read(self._named(rank, key))
        return said is None or self._watches[rank].look(said)

    def _vanish(self) -> None:
        """The last thing on the way out, heart stopped: whoever goes last takes the empty directory away.

        Rank 0 has removed what we left, unless it went before us.
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

    def _place(self, stage: str, rank: int) -> Path:
        return self._directory / f"{self._token}.{stage}.rank-{rank}.json"

    def _named(self, rank: int, key: str) -> Path:
        return self._directory / f"rank-{rank}.{key}.json"

    def _write(self, path: Path, said: Mapping[str, Any], *, sync: bool = False) -> None:
        """Put a file in its place, whole; again, if somebody who left took the directory away meanwhile."""
        data = json.dumps(dict(said)).encode()
        while True:
            self._directory.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                return _put(path, data, sync=sync)


def _put(path: Path, data: bytes, *, sync: bool) -> None:
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    new.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    """A file's object; None if it is not there, not yet whole, or out of reach for a moment."""
    try:
        return parse_json(path.read_bytes(), source=path.name)
    except (OSError, UserError):
        return None


def _who(rank: int, said: Mapping[str, Any]) -> str:
    return f"rank `{rank}` (pid `{said.get('pid', '?')}` on `{said.get('host', '?')}`)"
