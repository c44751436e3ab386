"""The protocol of a directory that readers read from, and its implementation for local disks.

File names are relative to the folder, with slashes. The meaning of the files is left to the readers.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

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
"""Larger files are not read into memory at once: no index, configuration or tokenizer is as large."""


def whole(folder: Folder, name: str) -> bytes:
    """Read a small file completely. Raises UserError for a file larger than `MOST_WHOLE`."""
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
        """The last component of the path or URL."""
        ...

    @property
    def origin(self) -> Mapping[str, str]:
        """The source of the content: `id` and `revision` on the Hub where they are known, else `name`."""
        ...

    def has(self, name: str) -> bool:
        """Does the folder have a file of that name?"""
        ...

    def size(self, name: str) -> int:
        """Return a file's size in bytes. Raises UserError if the file is missing."""
        ...

    def version(self, name: str) -> str:
        """Return a text that changes when the file changes: size and modification time, or size and ETag."""
        ...

    def sha256(self, name: str) -> str | None:
        """Return a file's hash if the storage provides it, else None. Reads no data."""
        ...

    def children(self) -> list[str]:
        """Return the names of files and sub-folders, sorted; sub-folders end in a slash."""
        ...

    def files(self) -> list[str]:
        """Return the names of all files below, sorted.

        Folders that are not searched end in a slash: version control, download caches and links to folders.
        """
        ...

    def get(self, name: str) -> bytes:
        """Return the content of a small file. Raises UserError if the file is missing."""
        ...

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Read into `out` from `offset`. Raises UserError if the file ends before, or has changed since it was opened."""
        ...

    def changed(self) -> str:
        """Describe the first file that has changed since it was first read, here or below; empty if none has."""
        ...

    def below(self, name: str) -> Folder:
        """Return a sub-folder. A missing one is noticed on first use."""
        ...

    def close(self) -> None:
        """Close open files or connections."""
        ...


class FileRef(NamedTuple):
    """A file of a folder."""

    folder: Folder
    name: str

    @property
    def size(self) -> int:
        return self.folder.size(self.name)

    def get(self) -> bytes:
        return self.folder.get(self.name)

    def bands(self) -> Iterator[memoryview]:
        """Yield the content in blocks of `BAND_BYTES`; a block is valid until the next one."""
        size, buffer = self.size, memoryview(bytearray(min(self.size, BAND_BYTES)))
        for start in range(0, size, BAND_BYTES):
            band = buffer[: min(BAND_BYTES, size - start)]
            self.folder.read_into(self.name, start, band)
            yield band


def link(folder: Folder, name: str) -> str:
    """Describe a listed name that is no file, in words that follow the name: a broken link with its target, or neither."""
    if isinstance(folder, LocalFolder) and (folder.path / name).is_symlink():
        return f"is a link to `{(folder.path / name).readlink()}`, which does not exist"
    return "is not a file"


class LocalFolder:
    """A directory of the file system."""

    def __init__(self, path: Path, *, direct: bool = False, within: LocalFolder | None = None) -> None:
        """`direct`: read from the disk, past the page cache. `within`: share the open files of that folder."""
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
        snapshot = _SNAPSHOT.search(str(self.path))
        if snapshot:
            return {"id": f"{snapshot[1]}/{snapshot[2]}", "revision": snapshot[3]}
        return {"name": printable(self.name)}

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        return self._status(name).st_size

    def version(self, name: str) -> str:
        return _version(self._status(name))

    def sha256(self, name: str) -> str | None:
        """Return the hash that names a file of the Hub's cache; None in other directories."""
        target = (self.path / name).resolve()
        known = target.parent.name == "blobs" and len(target.name) == 64
        return target.name if known else None

    def children(self) -> list[str]:
        if not self.path.is_dir():
            return []
        return sorted(f"{path.name}/" if path.is_dir() else path.name for path in self.path.iterdir())

    def files(self) -> list[str]:
        names: list[str] = []
        for folder, folders, files in self.path.walk():
            closed = {name for name in folders if name in NOT_OF_THE_MODEL or (folder / name).is_symlink()}
            folders[:] = [name for name in folders if name not in closed]
            inside = [f"{name}/" if name in closed or (folder / name).is_dir() else name for name in [*closed, *files]]
            prefix = "" if folder == self.path else f"{folder.relative_to(self.path).as_posix()}/"
            names += [prefix + name for name in inside]
        return sorted(names)

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
        """Read the aligned blocks around a range into page-aligned memory, as direct I/O requires."""
        start, length = self._blocks_around(offset, len(out))
        if not hasattr(self._local, "buffer"):
            self._local.buffer = Buffer()
        blocks: Array = self._local.buffer.view((length,), np.dtype(np.uint8))
        with self._files.using(path, direct_flag()) as descriptor:
            read_exactly(descriptor, as_bytes(blocks), start, path=path, least=offset + len(out) - start)
        out[:] = as_bytes(blocks)[offset - start : offset - start + len(out)]

    @staticmethod
    def _blocks_around(offset: int, length: int) -> tuple[int, int]:
        """Return the offset and the length of the aligned blocks around a range of bytes."""
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
        """Return the path of a file, cached: building and hashing a path takes longer than the read."""
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
    """Describe how a file has changed: written to, removed or replaced; empty if it has not."""
    try:
        now = path.stat()
    except OSError:
        return "it is gone"
    if _version(now) != _version(before):
        return f"it was `{_version(before)}`, it is `{_version(now)}`"
    same = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
    return "" if same else "another file of the same size and time has its name"
