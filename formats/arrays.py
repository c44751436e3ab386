"""Arrays as memory: buffers that are used again, copies that do not look at values, rows some at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from formats.disk import io_alignment
from formats.spec import Array, Shape


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


def bands(rows: slice, step: int) -> Iterator[slice]:
    """A range of rows, `step` at a time."""
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))
