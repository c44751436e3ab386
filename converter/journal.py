"""Record which pieces of a conversion are done: lines appended as pieces are finished, read again by `--resume`.

A line is appended after the kernel has the piece's bytes, so a killed process loses nothing that is recorded. A machine that
goes down may lose more, and so may a disk that fails: lines of another boot, or from before such a failure, count only up to
the last one that says how many were synced.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SYNC_SECONDS = 30.0
"""Seconds of work that are lost at most when a machine goes down."""

_DOUBTED = ".doubted"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Return the id of this boot of this machine; where the system has none, a random text, which equals no other."""
    return _BOOT.read_text().strip() if _BOOT.is_file() else secrets.token_hex(16)


@dataclass(slots=True)
class Finished:
    """What journals record: pieces by number, and hashes of complete tensors and files by name."""

    pieces: set[int] = field(default_factory=set[int])
    tensors: dict[str, str] = field(default_factory=dict[str, str])
    files: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, line: Any) -> None:
        """Add what a line of a journal records; nothing for a line of another kind."""
        match line:
            case [int(number)]:
                self.pieces.add(number)
            case {"tensor": str(name), "hash": str(digest)}:
                self.tensors[name] = digest
            case {"file": str(name), "hash": str(digest)}:
                self.files[name] = digest
            case _:
                pass


class Journal:
    """The journal of one process, a file in `folder`. `sync` gets the output's bytes onto the disk. Thread-safe."""

    def __init__(self, folder: Path, *, sync: Callable[[], None]) -> None:
        self._folder = folder
        self._descriptor = os.open(folder / f"journal-{secrets.token_hex(6)}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._sync = sync
        self._lines = 0
        self._synced = time.monotonic()
        self._lock, self._counting = threading.Lock(), threading.Lock()
        self._write({"boot": boot_id()})

    def piece(self, number: int) -> None:
        """Record that a piece is written."""
        self._write_line(f"[{number}]")  # a line that was cut short, and the next one after it, must not read as another number
        if time.monotonic() - self._synced > SYNC_SECONDS and self._lock.acquire(blocking=False):
            try:
                self.sync()
            finally:
                self._lock.release()

    def tensor(self, name: str, digest: str) -> None:
        """Record the hash of a tensor."""
        self._write({"tensor": name, "hash": digest})

    def file(self, name: str, digest: str) -> None:
        """Record the hash of a file."""
        self._write({"file": name, "hash": digest})

    def sync(self) -> None:
        """Get what was written onto the disk, then record how many lines that covers."""
        lines = self._lines
        with distrusted_on_sync_error(self._folder):
            self._sync()
        self._write({"synced": lines})
        os.fsync(self._descriptor)
        self._synced = time.monotonic()

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, line: Any) -> None:
        self._write_line(json.dumps(line))

    def _write_line(self, line: str) -> None:
        os.write(self._descriptor, f"{line}\n".encode())
        with self._counting:
            self._lines += 1


@contextmanager
def distrusted_on_sync_error(folder: Path) -> Generator[None]:
    """Mark all journals as doubtful if the block, which syncs the output, fails.

    The system may then drop what it had not written and report it only once: as after another boot, no journal counts beyond
    what was synced before.
    """
    try:
        yield
    except OSError:
        for path in folder.glob("journal-*"):
            with suppress(OSError):
                path.rename(path.with_suffix(_DOUBTED))
        raise


@contextmanager
def distrusted_on_write_error(folder: Path, check: Callable[[], None]) -> Generator[None]:
    """Mark all journals as doubtful if the block, which writes, fails and `check` raises OSError.

    `check` reports files that were closed during the block, to open others, and lost data: the next sync would not.
    """
    try:
        yield
    except BaseException:
        with suppress(OSError), distrusted_on_sync_error(folder):
            check()
        raise


def read_journals(folder: Path) -> Finished:
    """Return all that earlier processes finished, as far as it can be trusted."""
    finished = Finished()
    for path in sorted(folder.glob("journal-*")):
        for line in _trusted(path):
            finished.add(line)
    return finished


def _trusted(path: Path) -> list[Any]:
    """Return the lines of a journal that count. The last counts only if it ends with a newline."""
    lines = [_line(text) for text in path.read_bytes().split(b"\n")[:-1]]
    if lines and lines[0] == {"boot": boot_id()} and path.suffix != _DOUBTED:
        return lines
    return lines[: max((line["synced"] for line in lines if _says_synced(line)), default=0)]


def _says_synced(line: Any) -> bool:
    match line:
        case {"synced": int()}:
            return True
        case _:
            return False


def _line(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
