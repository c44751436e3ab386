"""A lock on an output directory for a whole run: a file beside it that names its holder.

Needs nothing of a file system but exclusive creation and atomic rename: flock may be missing on a shared one, or hold for one
host only. So the file outlives a killed holder, and recovering it must not go wrong when several try:

- A lock file is made whole by one process only, under a random key of its own, and only its maker ever writes into it.
- It is removed or replaced only by who holds the *claim* to it: a lock file of its own, named after the key. With the claim
  in hand the lock is read again; if it is still the dead one, it stays that until the claimant replaces it, by a rename, so
  that nobody gets in between. The holder itself needs the claim to remove its lock.
- A claim is held for an instant; who dies in it leaves a stale lock file like any other, recovered in the same way.

A holder on another host that was only stopped, for longer than patience, loses its lock: it finds out at its next beat, or
when it asks before it commits.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from formats.errors import TransientError, UserError
from formats.heartbeat import PATIENCE, Heartbeat, Process, StalenessTimer, pauses
from formats.json_objects import parse_json

_SIZE = 2048  # bytes of a lock file: it is always rewritten whole, by one write
_START = b'{"host": '
_OF_A_CLAIM = re.compile(r"[0-9a-f-]+(\.[0-9a-f-]+)*(\.new)?")


@dataclass(frozen=True, slots=True)
class Holder:
    """What a lock file says of who made it: `since` is for people to read, `key` is like no other."""

    process: Process
    since: str
    run: str
    key: str

    @classmethod
    def this(cls, run: str) -> Self:
        """A new holder: this process, from now on."""
        return cls(Process.this(), f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", run, secrets.token_hex(6))

    def text(self, heartbeat: int) -> bytes:
        """The lock file's content."""
        said = {**asdict(self.process), "since": self.since, "run": self.run, "key": self.key, "heartbeat": heartbeat}
        return json.dumps(said).encode().ljust(_SIZE - 1) + b"\n"

    @classmethod
    def parse(cls, text: bytes) -> Self | None:
        """The holder from a lock file's content; None where that is damaged."""
        try:
            said = parse_json(text, source="lock")
            started = None if said["started"] is None else int(said["started"])
            process = Process(str(said["host"]), int(said["pid"]), started, str(said["place"]))
            return cls(process, str(said["since"]), str(said["run"]), str(said["key"]))
        except (UserError, KeyError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"pid `{self.process.pid}` on `{self.process.host}` since `{self.since}`, run `{self.run}`"


@dataclass(frozen=True, slots=True)
class _Found:
    """A lock file as it was read. `key` is its holder's; one of its own where its maker died before it wrote any."""

    text: bytes
    key: str
    holder: Holder | None

    @property
    def is_a_lock(self) -> bool:
        """What a maker leaves that dies while it writes is the start of a lock, zeros, or nothing."""
        start = self.text[: len(_START)]
        return self.holder is not None or _START.startswith(start) or not self.text.strip(b"\0")


class Lock:
    """A lock that is held."""

    def __init__(self, target: Path, holder: Holder) -> None:
        self.holder, self._target, self._path = holder, target, lock_path(target)
        self._beats = 0
        self._lost = False

    def check(self) -> None:
        """Raise UserError if another run was seen to have taken the lock. Costs nothing."""
        if self._lost:
            found = _look(self._path)
            by = f" by {found.holder}" if found and found.holder else ""
            raise TransientError(
                f"the lock `{self._path}` was taken from this run{by}",
                hint=f"this run was not heard of for long; see that only one run writes `{self._target}`",
            )

    def confirm(self) -> None:
        """Look at the file now, then `check`. For the moment before something that cannot be undone."""
        self.beat()
        self.check()

    def is_ours(self) -> bool:
        """Whether the file, looked at now, still names us; false where it cannot be looked at."""
        try:
            self.beat()
        except OSError:
            return False
        return not self._lost

    def beat(self) -> None:
        """Show life; or learn that the lock is not ours any more."""
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            self._lost = True
            return
        try:
            # Whatever happens to the name meanwhile: what is open here is the file we made, and nobody else's.
            if (found := Holder.parse(os.read(file, _SIZE))) and found.key == self.holder.key:
                self._beats += 1
                os.pwrite(file, self.holder.text(self._beats), 0)
            else:
                self._lost = True
        finally:
            os.close(file)

    def release(self) -> None:
        """Remove the file, if it is still ours and nobody is about to recover it."""
        claim, claimant = _claim(self._path, self.holder.key), replace(self.holder, key=secrets.token_hex(6))
        try:
            if not _create(claim, claimant):
                return
        except OSError:  # a full disk; where the file system has second names, they take no room
            os.link(self._path, claim)
            claimant = self.holder
        try:
            if (found := _look(self._path)) and found.key == self.holder.key:
                self._path.unlink(missing_ok=True)
        finally:
            _drop(claim, claimant)


def lock_path(target: Path) -> Path:
    """Where the lock of a target lies: beside it, one whatever is made of it."""
    return target.with_name(f"{target.name}.lock")


@contextmanager
def lock(target: Path, *, run: str, patience: float = PATIENCE, note: Callable[[str], None] | None = None) -> Generator[Lock]:
    """Hold the lock of `target` for a block. UserError names the holder if there is one.

    A dead holder's lock is recovered: at once if it ran on this host, otherwise when its heartbeat has not changed for
    `patience` seconds; `note` is told before that wait. Hand the same `patience` to every run.
    """
    lock_path(target).parent.mkdir(parents=True, exist_ok=True)
    held = Lock(target, Holder.this(run))
    _take(lock_path(target), held.holder, target, patience, note)
    try:
        with Heartbeat(held.beat, patience):
            _sweep(lock_path(target), held.holder)
            yield held
    finally:
        with suppress(OSError):
            held.release()


def _take(path: Path, me: Holder, target: Path, patience: float, note: Callable[[str], None] | None) -> None:
    watch, before = StalenessTimer(patience), None
    for _ in pauses(patience):
        if _create(path, me):
            return
        if not (found := _look(path)):
            continue
        if not found.is_a_lock:
            raise _no_lock(path, target)
        alive = found.holder.process.is_alive() if found.holder else None
        quiet = watch.look(found)
        if alive or (before and before.key == found.key and before != found):
            raise _refusal(target, found.holder)
        if (quiet or alive is False) and _take_over(path, found, me, target, patience):
            return
        if note and not before and alive is None:
            note(f"`{path}` names {found.holder or 'nobody'}; watching up to {patience:.0f} s whether that run is alive")
        before = found


def _take_over(path: Path, stale: _Found, me: Holder, target: Path, patience: float) -> bool:
    """Put our lock in the place of a dead one; False if it is not there any more. UserError if another is doing so."""
    claim, claimant = _claim(path, stale.key), replace(me, key=secrets.token_hex(6))
    _take(claim, claimant, target, patience, None)
    new = path.with_name(f"{path.name}.{me.key}.new")
    try:
        if _look(path) != stale:
            return False
        new.write_bytes(me.text(0))
        new.replace(path)
    except FileNotFoundError:  # swept away: we were stopped for so long that the claim was broken
        return False
    else:
        return True
    finally:
        _drop(claim, claimant)


def _no_lock(path: Path, target: Path) -> UserError:
    return UserError(
        f"`{path}` is in the way: the lock of `{target}` has that name, and this file is none",
        hint="move it away, or choose another place",
    )


def _refusal(target: Path, holder: Holder | None) -> UserError:
    named = holder or "somebody whose lock is not readable"
    return UserError(f"another run is writing `{target}`: {named}", hint="wait for it, or stop it")


def _claim(path: Path, key: str) -> Path:
    return path.with_name(f"{path.name}.{key}")


def _create(path: Path, holder: Holder) -> bool:
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(file, holder.text(0))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)
    return True


def _look(path: Path) -> _Found | None:
    try:
        with path.open("rb") as file:
            text, status = file.read(_SIZE), os.fstat(file.fileno())
    except OSError:
        return None
    holder = Holder.parse(text)
    return _Found(text, holder.key if holder else f"{status.st_ino:x}-{status.st_mtime_ns:x}", holder)


def _drop(path: Path, holder: Holder) -> None:
    if (found := _look(path)) and found.key == holder.key:
        path.unlink(missing_ok=True)


def _sweep(path: Path, holder: Holder) -> None:
    """Remove what those who died in a claim left: while we hold the lock, no claim to another one means anything."""
    for other in path.parent.iterdir():
        name, mine, rest = other.name.partition(f"{path.name}.")
        if not name and mine and _OF_A_CLAIM.fullmatch(rest) and not rest.startswith(holder.key):
            other.unlink(missing_ok=True)
