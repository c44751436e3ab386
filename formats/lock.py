"""Lock an output directory for a whole run, with a file beside the directory that names the holder.

The lock needs only exclusive creation and atomic rename, because flock may be missing on a shared file system or may cover one
host only. A lock file therefore outlives a killed holder. These rules make its recovery safe when several processes try:

- One process creates a lock file, under a random key, and only that process writes into it.
- Only a process that holds the *claim* may remove or replace a lock file. A claim is a second lock file, named after the
  key. The claimant reads the lock again; a stale lock stays unchanged until the claimant replaces it by a rename. The holder
  also needs the claim to remove its own lock.
- A claim is held for an instant. A process that dies in between leaves a stale lock file, which is recovered the same way.

A holder on another host that is suspended for longer than `patience` loses its lock. It notices at its next heartbeat, or in
the check before its commit.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Self

from formats.errors import TransientError, UserError
from formats.heartbeat import PATIENCE, Heartbeat, Process, StalenessTimer, pauses
from formats.json_objects import parse_json

_SIZE = 2048  # bytes of a lock file: it is always rewritten whole, by one write
_START = b'{"host": '
_OF_A_CLAIM = re.compile(r"[0-9a-f-]+(\.[0-9a-f-]+)*(\.new)?")


@dataclass(frozen=True, slots=True)
class Holder:
    """The content of a lock file: the process, since when (for people to read), its run, and a random unique `key`."""

    process: Process
    since: str
    run: str
    key: str

    @classmethod
    def this(cls, run: str) -> Self:
        """Return a new holder: this process, from now on."""
        return cls(Process.this(), f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", run, secrets.token_hex(6))

    def text(self, heartbeat: int) -> bytes:
        """Return the content of the lock file, padded to `_SIZE` bytes."""
        process = {
            "host": self.process.host,
            "pid": self.process.pid,
            "started": self.process.started,
            "place": self.process.pid_scope,
        }
        fields = {**process, "since": self.since, "run": self.run, "key": self.key, "heartbeat": heartbeat}
        return json.dumps(fields).encode().ljust(_SIZE - 1) + b"\n"

    @classmethod
    def parse(cls, text: bytes) -> Self | None:
        """Return the holder from a lock file's content, or None where the content is damaged."""
        try:
            fields = parse_json(text, source="lock")
            started = None if fields["started"] is None else int(fields["started"])
            process = Process(str(fields["host"]), int(fields["pid"]), started, str(fields["place"]))
            return cls(process, str(fields["since"]), str(fields["run"]), str(fields["key"]))
        except (UserError, KeyError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"pid `{self.process.pid}` on `{self.process.host}` since `{self.since}`, run `{self.run}`"


class _LockFile(NamedTuple):
    """A lock file that was read. `key` is its holder's, or is derived from the inode where the maker died before it wrote one."""

    text: bytes
    key: str
    holder: Holder | None

    @property
    def is_a_lock(self) -> bool:
        """Is the file a lock? A maker that dies while it writes leaves the start of a lock, zeros, or nothing."""
        start = self.text[: len(_START)]
        return self.holder is not None or _START.startswith(start) or not self.text.strip(b"\0")


class Lock:
    """A lock that this process holds."""

    def __init__(self, target: Path, holder: Holder) -> None:
        self.holder, self._target, self._path = holder, target, lock_path(target)
        self._beats = 0
        self._lost = False

    def check(self) -> None:
        """Raise UserError if a heartbeat has seen that another run took the lock. Reads no file."""
        if self._lost:
            current = _read_lock(self._path)
            by = f" by {current.holder}" if current and current.holder else ""
            raise TransientError(
                f"the lock `{self._path}` was taken from this run{by}",
                hint=f"this run showed no heartbeat for too long; make sure that only one run writes `{self._target}`",
            )

    def confirm(self) -> None:
        """Read the lock file now, then `check`. Call it before something that cannot be undone."""
        self.beat()
        self.check()

    def is_ours(self) -> bool:
        """Does the lock file still name this holder? False where the file cannot be read."""
        try:
            self.beat()
        except OSError:
            return False
        return not self._lost

    def beat(self) -> None:
        """Rewrite the lock file as a heartbeat, or notice that another process holds the lock now."""
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            self._lost = True
            return
        try:
            # The open file stays the one that this process created, whatever its name refers to by now.
            if (current := Holder.parse(os.read(file, _SIZE))) and current.key == self.holder.key:
                self._beats += 1
                os.pwrite(file, self.holder.text(self._beats), 0)
            else:
                self._lost = True
        finally:
            os.close(file)

    def release(self) -> None:
        """Remove the lock file, unless another process holds it or is recovering it."""
        claim, claimant = _claim(self._path, self.holder.key), replace(self.holder, key=secrets.token_hex(6))
        try:
            if not _create(claim, claimant):
                return
        except OSError:  # a full disk: a hard link needs no free space
            os.link(self._path, claim)
            claimant = self.holder
        try:
            if (current := _read_lock(self._path)) and current.key == self.holder.key:
                self._path.unlink(missing_ok=True)
        finally:
            _remove_if_held(claim, claimant)


def lock_path(target: Path) -> Path:
    """Return the path of the lock file of `target`, beside it."""
    return target.with_name(f"{target.name}.lock")


@contextmanager
def lock(target: Path, *, run: str, patience: float = PATIENCE, note: Callable[[str], None] | None = None) -> Generator[Lock]:
    """Hold the lock of `target` for a `with` block. Raises UserError that names the holder if another run has it.

    The lock of a dead holder is recovered: at once if it ran on this host, otherwise when its heartbeat has not changed for
    `patience` seconds; `note` is called before that wait. Every run must use the same `patience`.
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
        if not (current := _read_lock(path)):
            continue
        if not current.is_a_lock:
            raise _not_a_lock(path, target)
        alive = current.holder.process.is_alive() if current.holder else None
        quiet = watch.look(current)
        if alive or (before and before.key == current.key and before != current):
            raise _held_by_another(target, current.holder)
        if (quiet or alive is False) and _take_over(path, current, me, target, patience):
            return
        if note and not before and alive is None:
            note(f"`{path}` names {current.holder or 'nobody'}; watching up to {patience:.0f} s whether that run is alive")
        before = current


def _take_over(path: Path, stale: _LockFile, me: Holder, target: Path, patience: float) -> bool:
    """Replace a stale lock file by ours. Returns False if it has changed. Raises UserError if another process is replacing it."""
    claim, claimant = _claim(path, stale.key), replace(me, key=secrets.token_hex(6))
    _take(claim, claimant, target, patience, None)
    new = path.with_name(f"{path.name}.{me.key}.new")
    try:
        if _read_lock(path) != stale:
            return False
        new.write_bytes(me.text(0))
        new.replace(path)
    except (
        FileNotFoundError
    ):  # removed by `_sweep` of another holder: this process was suspended so long that its claim was recovered
        return False
    else:
        return True
    finally:
        _remove_if_held(claim, claimant)


def _not_a_lock(path: Path, target: Path) -> UserError:
    return UserError(
        f"`{path}` is not a lock file, but the lock of `{target}` needs that name",
        hint="move it away, or choose another place",
    )


def _held_by_another(target: Path, holder: Holder | None) -> UserError:
    named = holder or "a holder whose lock file is not readable"
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


def _read_lock(path: Path) -> _LockFile | None:
    try:
        with path.open("rb") as file:
            text, status = file.read(_SIZE), os.fstat(file.fileno())
    except OSError:
        return None
    holder = Holder.parse(text)
    return _LockFile(text, holder.key if holder else f"{status.st_ino:x}-{status.st_mtime_ns:x}", holder)


def _remove_if_held(path: Path, holder: Holder) -> None:
    if (current := _read_lock(path)) and current.key == holder.key:
        path.unlink(missing_ok=True)


def _sweep(path: Path, holder: Holder) -> None:
    """Remove claims that dead processes left. While this process holds the lock, no claim to another lock is valid."""
    for other in path.parent.iterdir():
        name, mine, rest = other.name.partition(f"{path.name}.")
        if not name and mine and _OF_A_CLAIM.fullmatch(rest) and not rest.startswith(holder.key):
            other.unlink(missing_ok=True)
