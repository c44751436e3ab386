"""Arrays as memory: buffers that are used again, copies that do not look at values, rows some at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

import numpy as np

from formats.disk import io_alignment
from formats.spec import Array, Region, Shape


class Buffer:
    """Memory that is used again and grows when it must."""

    def __init__(self) -> None:
        self._memory: Array = np.empty(0, np.uint8)

    def view(self, shape: Shape, dtype: np.dtype[Any], *, place: int = 0) -> Array:
        """An array of unspecified values, valid until the next call; its address has the remainder by
        `io_alignment()` that `place` has."""
        block, nbytes = io_alignment(), prod(shape) * dtype.itemsize
        if self._memory.nbytes < nbytes + block:
            self._memory = np.frombuffer(mmap.mmap(-1, nbytes + block), np.uint8)
        start = (place - self._memory.ctypes.data) % block
        return self._memory[start : start + nbytes].view(dtype).reshape(shape)


def copy(out: Array, data: Array) -> None:
    """Move elements of one dtype as whole numbers: numpy copies foreign dtypes such as bfloat16 one by one."""
    plain = np.dtype(f"u{data.dtype.itemsize}")
    np.copyto(out.view(plain), data.view(plain))


def same_bits(one: Array, other: Array) -> bool:
    """Do two arrays of one dtype and shape hold the same bytes?"""
    plain = np.dtype(f"u{one.dtype.itemsize}")
    return np.array_equal(one.view(plain), other.view(plain))


def as_bytes(array: Array) -> memoryview:
    """The memory of a contiguous array, as bytes."""
    return memoryview(array.reshape(-1).view(np.uint8))


def contiguous_regions(shape: Shape, count: int) -> Iterator[Region]:
    """Cut an array into regions of at most `count` elements (at least one), each one run in C order, in that order.

    The first axis along which one step fits is cut; of all axes before it, a region has one index.

    >>> [tuple((part.start, part.stop) for part in region) for region in contiguous_regions((2, 3), 2)]
    [((0, 1), (0, 2)), ((0, 1), (2, 3)), ((1, 2), (0, 2)), ((1, 2), (2, 3))]
    """
    axis = next((axis for axis in range(len(shape)) if prod(shape[axis + 1 :]) <= count), max(len(shape) - 1, 0))
    inner = tuple(slice(0, size) for size in shape[axis + 1 :])
    step = max(1, count // max(prod(shape[axis + 1 :]), 1))
    for index in product(*(range(size) for size in shape[:axis])):
        outer = tuple(slice(number, number + 1) for number in index)
        for band in bands(slice(0, shape[axis]), step) if shape else ():
            yield (*outer, band, *inner)
    if not shape:
        yield ()


def offset_of(region: Region, shape: Shape) -> int:
    """Where in an array of that shape, in C order, a region's first element is; in elements."""
    position = 0
    for size, part in zip(shape, region, strict=True):
        position = position * size + part.start
    return position


def bands(rows: slice, step: int) -> Iterator[slice]:
    """A range of rows, `step` at a time."""
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))
