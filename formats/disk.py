"""Bytes at positions in files: whole reads, whole writes, boxes out of stored arrays, and errors a user can act on.

Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from formats.errors import UserError
from formats.spec import Array, Region, Shape, extent

BLOCK = 4096
"""What direct I/O is aligned to: a page, and no smaller than any disk's sector."""

BYPASS_FROM = 64 << 10
"""Shorter writes are not worth bypassing the page cache."""

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

    def __init__(self, flags: int = os.O_RDONLY) -> None:
        self._flags = flags | os.O_CLOEXEC
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, self._flags, 0o644)
            return self._open[path]

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()


class Outputs:
    """Files being written, at any position, from any thread.

    Whole blocks bypass the page cache where the file system allows: copying through it costs more processor time than all
    the rest of a conversion, and evicts what others have cached. Edges of less than a block go through it.
    """

    def __init__(self) -> None:
        self._buffered = Files(os.O_RDWR | os.O_CREAT)
        self._direct = Files(os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0))
        self._may_bypass = hasattr(os, "O_DIRECT")
        self._local = threading.local()

    def write(self, path: Path, offset: int, data: Array) -> None:
        """Put an array, in C order, at `offset`."""
        head, middle = -offset % BLOCK, (data.nbytes - -offset % BLOCK) // BLOCK * BLOCK
        if not self._may_bypass or middle < BYPASS_FROM:
            return self._write_buffered(path, offset, as_bytes(np.ascontiguousarray(data)))
        aligned = self._aligned(data, offset)
        end = head + middle
        self._write_direct(path, offset + head, aligned[head:end])
        self._write_buffered(path, offset, aligned[:head])
        return self._write_buffered(path, offset + end, aligned[end:])

    def put(self, path: Path, offset: int, data: bytes) -> None:
        """Put a few bytes at `offset`."""
        self._write_buffered(path, offset, memoryview(data))

    def close(self) -> None:
        self._buffered.close()
        self._direct.close()

    def _aligned(self, data: Array, offset: int) -> memoryview:
        """The array's bytes in memory whose addresses have the same remainder by `BLOCK` as their place in the file."""
        if data.flags.c_contiguous and (data.ctypes.data - offset) % BLOCK == 0:
            return as_bytes(data)
        if not hasattr(self._local, "buffer"):
            self._local.buffer = Buffer()
        placed = self._local.buffer.view(data.shape, data.dtype, place=offset)
        copy(placed, data)
        return as_bytes(placed)

    def _write_direct(self, path: Path, offset: int, data: memoryview) -> None:
        try:
            _write_all(self._direct.descriptor(path), data, offset)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._may_bypass = False
            self._write_buffered(path, offset, data)

    def _write_buffered(self, path: Path, offset: int, data: memoryview) -> None:
        """Through the page cache; long writes are started towards the disk at once, so that it works while we read on."""
        descriptor = self._buffered.descriptor(path)
        _write_all(descriptor, data, offset)
        if len(data) >= BYPASS_FROM:
            os.posix_fadvise(descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)


class Buffer:
    """Memory that is used again and grows when it must."""

    def __init__(self) -> None:
        self._memory: Array = np.empty(0, np.uint8)

    def view(self, shape: Shape, dtype: np.dtype[Any], *, place: int = 0) -> Array:
        """An array of unspecified values, valid until the next call; its address has the remainder by `BLOCK` that `place`
        has."""
        start = place % BLOCK
        end = start + prod(shape) * dtype.itemsize
        if self._memory.nbytes < end:
            self._memory = np.frombuffer(mmap.mmap(-1, end + BLOCK), np.uint8)  # mapped memory starts at a page
        return self._memory[start:end].view(dtype).reshape(shape)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


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


def read_box(files: Files, stored: Stored, region: Region, out: Array) -> None:
    """Copy a box of a stored array into `out`, of the box's shape.

    A box that is not one run of bytes is read row by row where its rows are long, and otherwise as the whole rows around
    it, some at a time: system calls stay few and memory small.
    """
    if _contiguous(stored.shape, extent(region)):
        return _read_run(files, stored, region, out)
    if region[0].stop - region[0].start == 1:
        return read_box(files, _row(stored, region[0].start, out.dtype.itemsize), region[1:], out[0])
    step = 1 if out[0].nbytes >= GATHER_BELOW else max(1, GATHER_BELOW // (prod(stored.shape[1:]) * out.dtype.itemsize))
    for rows in bands(region[0], step):
        part = out[rows.start - region[0].start : rows.stop - region[0].start]
        if step == 1:
            read_box(files, stored, (rows, *region[1:]), part)
        else:
            scratch = np.empty((rows.stop - rows.start, *stored.shape[1:]), out.dtype)
            _read_run(files, stored, (rows, *(slice(0, size) for size in stored.shape[1:])), scratch)
            copy(part, scratch[(slice(None), *region[1:])])
    return None


def write_box(outputs: Outputs, stored: Stored, region: Region, data: Array) -> None:
    """The way back of `read_box`: put `data` into a box of an array that lies, or will lie, in a file."""
    if _contiguous(stored.shape, extent(region)):
        return outputs.write(stored.path, place_of(stored, region, data.dtype.itemsize), data)
    for number, row in enumerate(range(region[0].start, region[0].stop)):
        write_box(outputs, _row(stored, row, data.dtype.itemsize), region[1:], data[number])
    return None


def place_of(stored: Stored, region: Region, itemsize: int) -> int:
    """Where in its file a region's first byte lies."""
    return stored.offset + _element(stored.shape, region) * itemsize


def bands(rows: slice, step: int) -> Iterator[slice]:
    """A range of rows, `step` at a time."""
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _read_run(files: Files, stored: Stored, region: Region, out: Array) -> None:
    start = place_of(stored, region, out.dtype.itemsize)
    target = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
    read_exactly(files.descriptor(stored.path), as_bytes(target), start, path=stored.path)
    if target is not out:
        copy(out, target)


def _row(stored: Stored, row: int, itemsize: int) -> Stored:
    """One row of a stored array, as an array of one dimension less."""
    return Stored(stored.path, stored.offset + row * prod(stored.shape[1:]) * itemsize, stored.shape[1:])


def copy(out: Array, data: Array) -> None:
    """Move elements of one dtype as whole numbers: numpy copies foreign dtypes such as bfloat16 one by one."""
    plain = np.dtype(f"u{data.dtype.itemsize}")
    np.copyto(out.view(plain), data.view(plain))


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
def explained(path: Path | None = None) -> Generator[None]:
    """Turn what a full, read-only or broken disk says into errors that name the place and the way out.

    `path`: where was being written.
    """
    try:
        yield
    except OSError as error:
        if path and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = free_bytes(path)
            raise UserError(
                f"no room left for `{path}`: {error.strerror} ({free / 1e9:.1f} GB free)",
                hint="free space or choose another place; nothing readable was left there",
            ) from error
        named = f"`{error.filename or path}`" if error.filename or path else "a file"
        raise UserError(f"cannot use {named}: {error.strerror or error}") from error


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user may still write below `path`, which need not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
