"""Arrays as memory: reusable buffers, copies of raw bits, and contiguous regions of limited size."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import cache
from itertools import product
from math import prod
from typing import Any

import numpy as np

from formats.disk import io_alignment
from formats.spec import Array, Region, Shape


class Buffer:
    """Memory that is reused from call to call and grows when needed. Not shared by threads."""

    def __init__(self) -> None:
        self._memory: Array = np.empty(0, np.uint8)
        self._address = 0

    def view(self, shape: Shape, dtype: np.dtype[Any], *, offset: int = 0) -> Array:
        """Return an uninitialized array, valid until the next call; its address equals `offset` modulo `io_alignment()`."""
        block, nbytes = io_alignment(), prod(shape) * dtype.itemsize
        if self._memory.nbytes < nbytes + block:
            self._memory = np.frombuffer(mmap.mmap(-1, nbytes + block), np.uint8)
            self._address = self._memory.ctypes.data
        start = (offset - self._address) % block
        return self._memory[start : start + nbytes].view(dtype).reshape(shape)


def copy(out: Array, data: Array) -> None:
    """Copy elements as unsigned integers of the same size: numpy copies foreign dtypes such as bfloat16 one by one."""
    plain = _unsigned(data.dtype.itemsize)
    np.copyto(out.view(plain), data.view(plain))


def same_bits(array: Array, other: Array) -> bool:
    """Do two arrays of one dtype and shape have the same bits?"""
    plain = _unsigned(array.dtype.itemsize)
    return np.array_equal(array.view(plain), other.view(plain))


@cache
def _unsigned(itemsize: int) -> np.dtype[Any]:
    return np.dtype(f"u{itemsize}")


def distinct(numbers: Array) -> list[int]:
    """Return the different values of an array of integers, sorted. `np.unique` imports `numpy.ma`, 5 ms of every start."""
    ordered = np.sort(numbers, axis=None)
    return ordered[np.diff(ordered, prepend=ordered[:1] - 1) != 0].tolist()


def as_bytes(array: Array) -> memoryview:
    """Return the memory of a contiguous array as bytes, without a copy."""
    return memoryview(array.reshape(-1).view(np.uint8))


def contiguous_regions(shape: Shape, count: int) -> Iterator[Region]:
    """Divide an array into regions of at most `count` elements (at least one), each contiguous in C order, in that order.

    The first axis along which one step fits is divided; a region has one index of each axis before it.

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
    """Return the offset of a region's first element in an array of that shape in C order, in elements."""
    position = 0
    for size, part in zip(shape, region, strict=True):
        position = position * size + part.start
    return position


def bands(rows: slice, step: int) -> Iterator[slice]:
    """Divide a range of rows into ranges of `step` rows."""
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))
