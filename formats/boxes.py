"""Boxes of arrays that lie in files: read from a folder, written to outputs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from formats.arrays import as_bytes, bands, copy, offset_of
from formats.folder import Folder
from formats.outputs import Outputs
from formats.spec import Array, Region, Shape, extent

GATHER_BELOW = 64 << 10
"""Runs of bytes shorter than this are not worth a system call each: the rows around them are read whole and sliced."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An array that lies contiguous, in C order, in a file."""

    file: str
    offset: int
    shape: Shape


def read_box(folder: Folder, stored: Stored, region: Region, out: Array) -> None:
    """Copy a box of a stored array into `out`, of the box's shape.

    A box that is not one run of bytes is read row by row where its rows are long, and otherwise as the whole rows around
    it, some at a time: system calls stay few and memory small.
    """
    if _contiguous(stored.shape, extent(region)):
        return _read_run(folder, stored, region, out)
    if region[0].stop - region[0].start == 1:
        return read_box(folder, _row(stored, region[0].start, out.dtype.itemsize), region[1:], out[0])
    step = 1 if out[0].nbytes >= GATHER_BELOW else max(1, GATHER_BELOW // (prod(stored.shape[1:]) * out.dtype.itemsize))
    for rows in bands(region[0], step):
        part = out[rows.start - region[0].start : rows.stop - region[0].start]
        if step == 1:
            read_box(folder, stored, (rows, *region[1:]), part)
        else:
            scratch = np.empty((rows.stop - rows.start, *stored.shape[1:]), out.dtype)
            _read_run(folder, stored, (rows, *(slice(0, size) for size in stored.shape[1:])), scratch)
            copy(part, scratch[(slice(None), *region[1:])])
    return None


def write_box(outputs: Outputs, stored: Stored, region: Region, data: Array) -> None:
    """The way back of `read_box`: put `data` into a box of an array that lies, or will lie, in a file."""
    if _contiguous(stored.shape, extent(region)):
        return outputs.write(stored.file, place_of(stored, region, data.dtype.itemsize), data)
    for number, row in enumerate(range(region[0].start, region[0].stop)):
        write_box(outputs, _row(stored, row, data.dtype.itemsize), region[1:], data[number])
    return None


def place_of(stored: Stored, region: Region, itemsize: int) -> int:
    """Where in its file a region's first byte lies."""
    return stored.offset + offset_of(region, stored.shape) * itemsize


def _read_run(folder: Folder, stored: Stored, region: Region, out: Array) -> None:
    start = place_of(stored, region, out.dtype.itemsize)
    target = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
    folder.read_into(stored.file, start, as_bytes(target))
    if target is not out:
        copy(out, target)


def _row(stored: Stored, row: int, itemsize: int) -> Stored:
    """One row of a stored array, as an array of one dimension less."""
    return Stored(stored.file, stored.offset + row * prod(stored.shape[1:]) * itemsize, stored.shape[1:])


def _contiguous(shape: Shape, box: Shape) -> bool:
    """Does a box of that extent lie in one run? Yes if all dimensions after the first cut one are whole."""
    free = False
    for whole, part in zip(shape, box, strict=True):
        if free and part != whole:
            return False
        free = free or part != 1
    return True
