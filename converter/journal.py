"""What of a conversion is done: lines appended as pieces are finished, read again by `--resume`.

A line stands only after its bytes are with the kernel, so a killed process loses nothing that is written down. A machine
that went down may lose more, and so may a disk that fails: lines of another boot, or from before such a failure, count only
up to the last one that says how many were synced.
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
"""What a machine that goes down costs at most, in time."""

_DOUBTED = ".doubted"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """This boot of this machine; where the system has no name for it, nothing equal to anything."""
    return _BOOT.read_text().strip() if _BOOT.is_file() else secrets.token_hex(16)


@dataclass(slots=True)
class Finished:
    """What journals say: pieces by number, and hashes of whole tensors and whole files by name."""

    pieces: set[int] = field(default_factory=set[int])
    tensors: dict[str, str] = field(default_factory=dict[str, str])
    files: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, line: Any) -> None:
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
    """A file of one process. Threads may write to it."""

    def __init__(self, folder: Path, *, sync: Callable[[], None]) -> None:
        self._folder = folder
        self._descriptor = os.open(folder / f"journal-{secrets.token_hex(6)}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._sync = sync
        self._lines = 0
        self._synced = time.monotonic()
        self._lock = threading.Lock()
        self._write({"boot": boot_id()})

    def piece(self, number: int) -> None:
        """A piece is written."""
        self._write([number])  # a line cut short and the next one after it must not read as another number
        if time.monotonic() - self._synced > SYNC_SECONDS and self._lock.acquire(blocking=False):
            try:
                self.sync()
            finally:
                self._lock.release()

    def tensor(self, name: str, digest: str) -> None:
        """All of a tensor has passed."""
        self._write({"tensor": name, "hash": digest})

    def file(self, name: str, digest: str) -> None:
        """All of a file has passed."""
        self._write({"file": name, "hash": digest})

    def sync(self) -> None:
        """Get what was written onto the disk, then say so."""
        lines = self._lines
        with doubted_if_lost(self._folder):
            self._sync()
        self._write({"synced": lines})
        os.fsync(self._descriptor)
        self._synced = time.monotonic()

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, line: Any) -> None:
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")
        self._lines += 1


@contextmanager
def doubted_if_lost(folder: Path) -> Generator[None]:
    """For a block that gets what was written onto the disk. Where that fails, the system may drop what it had not written
    yet and never speak of it again: then no journal counts beyond what was synced, as after another boot."""
    try:
        yield
    except OSError:
        for path in folder.glob("journal-*"):
            with suppress(OSError):
                path.rename(path.with_suffix(_DOUBTED))
        raise


@contextmanager
def doubted_if_lost_on_the_way(folder: Path, check: Callable[[], None]) -> Generator[None]:
    """For a block that writes: whatever ends it, `check` raises OSError if a file that was synced and closed in the middle of it,
    to open another, has lost something. The sync that comes next would not tell."""
    try:
        yield
    except BaseException:
        with suppress(OSError), doubted_if_lost(folder):
            check()
        raise


def read_journals(folder: Path) -> Finished:
    """All that earlier processes finished, as far as it can be trusted."""
    finished = Finished()
    for path in sorted(folder.glob("journal-*")):
        for line in _trusted(path):
            finished.add(line)
    return finished


def _trusted(path: Path) -> list[Any]:
    """A journal's lines; the last counts only if it was written to its end."""
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
