"""Bytes at positions in files: whole reads, whole writes, boxes out of stored arrays, and errors a user can act on.

Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from formats.errors import UserError
from formats.spec import Array, Region, Shape, extent

GATHER_BELOW = 64 << 10
"""Runs of bytes shorter than this are not worth a system call each: the rows around them are read whole and sliced."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An array that lies contiguous, in C order, in a file."""

    path: Path
    offset: int
    shape: Shape


class Files:
    """Open file descriptors by path, shared by threads, closed together."""

    def __init__(self, *, write: bool = False) -> None:
        self._flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, self._flags | os.O_CLOEXEC, 0o644)
            return self._open[path]

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()


def read_exactly(descriptor: int, out: memoryview, offset: int, *, path: Path) -> None:
    """Fill `out` from `offset`; a file that ends before is an error that names it."""
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done:]], offset + done)
        if count == 0:
            raise UserError(
                f"`{path.name}` ends at byte {offset + done}, but its header promises data up to {offset + len(out)}",
                hint="the file is truncated or still being written; fetch it again",
            )
        done += count


def write_exactly(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset` and ask the kernel to start writing it to the disk.

    Without that request a whole file stays in memory until the final fsync, which then waits for the disk alone; with it
    the disk works while the next piece is read.
    """
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
    os.posix_fadvise(descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)


def read_box(files: Files, stored: Stored, region: Region, out: Array) -> None:
    """Copy a box of a stored array into `out`, with few system calls and no more than the box's own rows in memory."""
    descriptor, itemsize = files.descriptor(stored.path), out.dtype.itemsize
    box = extent(region)
    if _contiguous(stored.shape, box):
        if out.flags.c_contiguous:
            start = stored.offset + _element(stored.shape, region) * itemsize
            return read_exactly(descriptor, as_bytes(out), start, path=stored.path)
        scratch = np.empty(box, out.dtype)
        read_box(files, stored, region, scratch)
        out[...] = scratch
        return None
    if box[0] > 1 and prod(box[1:]) * itemsize >= GATHER_BELOW:
        for row in range(box[0]):
            at = slice(region[0].start + row, region[0].start + row + 1)
            read_box(files, stored, (at, *region[1:]), out[row : row + 1])
        return None
    rows = region[0], *(slice(0, size) for size in stored.shape[1:])
    scratch = np.empty(extent(rows), out.dtype)
    read_box(files, stored, rows, scratch)
    out[...] = scratch[(slice(None), *region[1:])]
    return None


def as_bytes(array: Array) -> memoryview:
    """The memory of a contiguous array, as bytes."""
    return memoryview(array.reshape(-1).view(np.uint8))


def _contiguous(shape: Shape, box: Shape) -> bool:
    """Does a box of that extent lie in one run? Yes if all dimensions after the first cut one are whole."""
    free = False
    for whole, part in zip(shape, box, strict=True):
        if free and part != whole:
            return False
        free = free or part != 1
    return True


def _element(shape: Shape, region: Region) -> int:
    """Position of a region's first element, in elements."""
    position = 0
    for size, part in zip(shape, region, strict=True):
        position = position * size + part.start
    return position


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what a full, read-only or broken disk says into errors that name the folder and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = free_bytes(path)
            raise UserError(
                f"no room left for `{path}`: {error.strerror} ({free / 1e9:.1f} GB free)",
                hint="free space or choose another place; nothing readable was left there",
            ) from error
        raise UserError(f"cannot use `{error.filename or path}`: {error.strerror}") from error


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user may still write below `path`, which need not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
