"""Read and write regions of arrays that are stored contiguously in files."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import numpy as np

from formats.arrays import as_bytes, bands, copy, offset_of
from formats.folder import Folder
from formats.outputs import Outputs
from formats.spec import Array, Region, Shape

GATHER_BELOW = 64 << 10
"""Contiguous parts shorter than this are not worth a system call each: the rows around them are read whole and sliced."""


class StoredArray(NamedTuple):
    """An array stored contiguously, in C order, at a byte offset of a file."""

    file: str
    offset: int
    shape: Shape


def read_region(folder: Folder, stored: StoredArray, region: Region, out: Array) -> None:
    """Read a region of a stored array into `out`, which has the region's shape."""

    def read(start: int, target: Array) -> None:
        folder.read_into(stored.file, stored.offset + start * out.dtype.itemsize, as_bytes(target))

    read_flat(read, stored.shape, region, out)


def read_flat(read: Callable[[int, Array], None], shape: Shape, region: Region, out: Array, *, at: int = 0) -> None:
    """Read a region of an array in C order into `out`, which has the region's shape.

    `read` fills a contiguous array from an element on; the array's first is `at`. A region that is not contiguous is read row by
    row where its rows are long, and otherwise as the whole rows around it, some at a time, so that calls stay few and memory
    small.
    """
    if _contiguous(shape, region):
        return _read_contiguous(read, at + offset_of(region, shape), out)
    row = prod(shape[1:])
    if region[0].stop - region[0].start == 1:
        return read_flat(read, shape[1:], region[1:], out[0], at=at + region[0].start * row)
    step = 1 if out[0].nbytes >= GATHER_BELOW else max(1, GATHER_BELOW // (row * out.dtype.itemsize))
    for rows in bands(region[0], step):
        part, start = out[rows.start - region[0].start : rows.stop - region[0].start], at + rows.start * row
        if step == 1:
            read_flat(read, shape[1:], region[1:], part[0], at=start)
        else:
            scratch = np.empty((rows.stop - rows.start, *shape[1:]), out.dtype)
            read(start, scratch)
            copy(part, scratch[(slice(None), *region[1:])])
    return None


def write_region(outputs: Outputs, stored: StoredArray, region: Region, data: Array) -> None:
    """Write `data` into a region of a stored array, row by row where the region is not contiguous."""
    if _contiguous(stored.shape, region):
        return outputs.write(stored.file, file_offset(stored, region, data.dtype.itemsize), data)
    for number, row in enumerate(range(region[0].start, region[0].stop)):
        write_region(outputs, _row(stored, row, data.dtype.itemsize), region[1:], data[number])
    return None


def file_offset(stored: StoredArray, region: Region, itemsize: int) -> int:
    """Return the byte offset in the file of a region's first element."""
    return stored.offset + offset_of(region, stored.shape) * itemsize


def _read_contiguous(read: Callable[[int, Array], None], start: int, out: Array) -> None:
    target = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
    read(start, target)
    if target is not out:
        copy(out, target)


def _row(stored: StoredArray, row: int, itemsize: int) -> StoredArray:
    """Return one row of a stored array, as an array of one dimension less."""
    return StoredArray(stored.file, stored.offset + row * prod(stored.shape[1:]) * itemsize, stored.shape[1:])


def _contiguous(shape: Shape, region: Region) -> bool:
    """Is a region contiguous in C order? It is if all dimensions after the first partial one are whole."""
    free = False
    for whole, part in zip(shape, region, strict=True):
        count = part.stop - part.start
        if free and count != whole:
            return False
        free = free or count != 1
    return True
