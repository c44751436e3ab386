"""A directory of files, wherever it lies: what readers ask of one, and the one on a local disk.

File names are relative to the folder, with slashes. Knows nothing of what the files hold.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from formats.arrays import Buffer, as_bytes
from formats.disk import direct_flag, forget, io_alignment, read_exactly, refuses_direct
from formats.errors import UserError, printable
from formats.open_files import Files
from formats.spec import Array

_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([^/]+)$")  # of the Hub's cache

BAND_BYTES = 4 << 20

NOT_OF_THE_MODEL = {".git", ".cache", ".huggingface"}


MOST_WHOLE = 256 << 20
"""Larger files are not read whole: no index, configuration or tokenizer is."""


def whole(folder: Folder, name: str) -> bytes:
    """All bytes of a file that should be small; UserError if it is not."""
    size = folder.size(name)
    if size > MOST_WHOLE:
        raise UserError(f"`{name}` has {size} bytes, more than any file of its kind", hint="the file is damaged")
    out = bytearray(size)
    folder.read_into(name, 0, memoryview(out))
    return bytes(out)


class Folder(Protocol):
    """An opened directory. Files may be read in any order and from several threads."""

    @property
    def label(self) -> str:
        """The path or URL, for messages."""
        ...

    @property
    def name(self) -> str:
        """The last part of it."""
        ...

    @property
    def origin(self) -> Mapping[str, str]:
        """Where its content comes from: `id` and `revision` on the Hub where they are known, else its `name`."""
        ...

    def has(self, name: str) -> bool:
        """Is there a file of that name?"""
        ...

    def size(self, name: str) -> int:
        """A file's size in bytes; UserError if it is not there."""
        ...

    def version(self, name: str) -> str:
        """What changes when a file does: its size with the time of its last change, or with its ETag."""
        ...

    def sha256(self, name: str) -> str | None:
        """A file's hash where whoever keeps it tells without its being read."""
        ...

    def children(self) -> list[str]:
        """Files and folders right in here, sorted; folders end in a slash."""
        ...

    def files(self) -> list[str]:
        """All files below, sorted. Folders that are not looked into end in a slash: those of version control and download
        caches, and links to folders."""
        ...

    def get(self, name: str) -> bytes:
        """A small file, whole; UserError if it is not there."""
        ...

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`; UserError where the file ends before, or is not what it was when it was opened."""
        ...

    def changed(self) -> str:
        """Which of the files that were read here or below is not what it was when it was first looked at, and how it differs;
        empty if none."""
        ...

    def below(self, name: str) -> Folder:
        """The folder of that name in this one. Whether it is there shows when something is asked of it."""
        ...

    def close(self) -> None:
        """Let go of open files or connections."""
        ...


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file of a folder."""

    folder: Folder
    name: str

    @property
    def size(self) -> int:
        return self.folder.size(self.name)

    def get(self) -> bytes:
        return self.folder.get(self.name)

    def bands(self) -> Iterator[memoryview]:
        """Its bytes, some MiB at a time; each valid until the next."""
        size, buffer = self.size, memoryview(bytearray(min(self.size, BAND_BYTES)))
        for start in range(0, size, BAND_BYTES):
            band = buffer[: min(BAND_BYTES, size - start)]
            self.folder.read_into(self.name, start, band)
            yield band


def link(folder: Folder, name: str) -> str:
    """Say of a name that is listed in a folder, and no file, where it leads: words that follow the name."""
    if isinstance(folder, LocalFolder) and (folder.path / name).is_symlink():
        return f"is a link to `{(folder.path / name).readlink()}`, which is not there"
    return "is no file"


class LocalFolder:
    """A directory of the file system."""

    def __init__(self, path: Path, *, direct: bool = False, within: LocalFolder | None = None) -> None:
        """`direct`: read what lies on the disk, not what the system remembers of it. Folders `within` another share its
        open files."""
        self.path = path
        self._direct = direct
        self._may_bypass = bool(direct_flag())
        self._files = within._files if within else Files(os.O_RDONLY)
        self._local = within._local if within else threading.local()
        self._seen: dict[Path, os.stat_result] = within._seen if within else {}
        self._paths: dict[str, Path] = {}

    @property
    def label(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def origin(self) -> Mapping[str, str]:
        found = _SNAPSHOT.search(str(self.path))
        return {"id": f"{found[1]}/{found[2]}", "revision": found[3]} if found else {"name": printable(self.name)}

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        return self._status(name).st_size

    def version(self, name: str) -> str:
        return _version(self._status(name))

    def sha256(self, name: str) -> str | None:
        """What the Hub's cache names its files by; other directories do not tell."""
        target = (self.path / name).resolve()
        known = target.parent.name == "blobs" and len(target.name) == 64
        return target.name if known else None

    def children(self) -> list[str]:
        if not self.path.is_dir():
            return []
        return sorted(f"{path.name}/" if path.is_dir() else path.name for path in self.path.iterdir())

    def files(self) -> list[str]:
        found: list[str] = []
        for folder, folders, files in self.path.walk():
            closed = {name for name in folders if name in NOT_OF_THE_MODEL or (folder / name).is_symlink()}
            folders[:] = [name for name in folders if name not in closed]
            inside = [f"{name}/" if name in closed or (folder / name).is_dir() else name for name in [*closed, *files]]
            prefix = "" if folder == self.path else f"{folder.relative_to(self.path).as_posix()}/"
            found += [prefix + name for name in inside]
        return sorted(found)

    def get(self, name: str) -> bytes:
        return whole(self, name)

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        path = self._path(name)
        if self._direct and self._may_bypass:
            try:
                return self._read_past_cache(path, offset, out)
            except OSError as error:
                if not refuses_direct(error):
                    raise
                self._may_bypass = False
        with self._files.using(path) as descriptor:
            if self._direct:
                forget(descriptor, *self._blocks_around(offset, len(out)))
            read_exactly(descriptor, out, offset, path=path)
        return None

    def _read_past_cache(self, path: Path, offset: int, out: memoryview) -> None:
        """Whole blocks around what is asked for, into memory that starts at a page, as direct I/O wants it."""
        start, length = self._blocks_around(offset, len(out))
        if not hasattr(self._local, "buffer"):
            self._local.buffer = Buffer()
        blocks: Array = self._local.buffer.view((length,), np.dtype(np.uint8))
        with self._files.using(path, direct_flag()) as descriptor:
            read_exactly(descriptor, as_bytes(blocks), start, path=path, least=offset + len(out) - start)
        out[:] = as_bytes(blocks)[offset - start : offset - start + len(out)]

    @staticmethod
    def _blocks_around(offset: int, length: int) -> tuple[int, int]:
        """Where the blocks of direct I/O around some bytes of a file start, and how many bytes they have."""
        block = io_alignment()
        start = offset // block * block
        return start, -(-(offset + length - start) // block) * block

    def changed(self) -> str:
        for path, before in sorted(self._seen.items()):
            if how := _difference(path, before):
                return f"`{path}` changed while it was being read: {how}"
        return ""

    def below(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name, direct=self._direct, within=self)

    def close(self) -> None:
        self._files.close()

    def _path(self, name: str) -> Path:
        """Of a file that is read. Making and hashing a path anew for each read takes longer than the system call."""
        if name not in self._paths:
            path = self.path / name
            if path not in self._seen:
                self._status(name)
            self._paths[name] = path
        return self._paths[name]

    def _status(self, name: str) -> os.stat_result:
        if not self.has(name):
            raise UserError(f"`{self.label}` has no `{name}`")
        path = self.path / name
        status = path.stat()
        self._seen.setdefault(path, status)
        return status


def _version(status: os.stat_result) -> str:
    return f"{status.st_size} bytes, changed at {status.st_mtime_ns}"


def _difference(path: Path, before: os.stat_result) -> str:
    """How a file differs from what it was: written to, gone, or another in its place; empty if it does not."""
    try:
        now = path.stat()
    except OSError:
        return "it is gone"
    if _version(now) != _version(before):
        return f"it was `{_version(before)}`, it is `{_version(now)}`"
    same = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
    return "" if same else "another file of the same size and time has its name"
