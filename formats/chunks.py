"""The chunks of a distributed tensor as one array of numbers, and the check that they tile it.

A checkpoint has hundreds of thousands of chunks: an object for each would take hundreds of MiB, so objects are made for those
that are asked for. Opens no files.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from formats.errors import UserError
from formats.spec import Array, Region, Shape, intersect

_PLACE = 4  # numbers of a chunk after its box: file, offset, length, and where its data was found


@dataclass(frozen=True, slots=True)
class Place:
    """An archive: bytes `offset` to `offset + length` of a file."""

    file: str
    offset: int
    length: int
    compressed: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and the archive that holds it."""

    region: Region
    place: Place


class ChunkedTensor:
    """A tensor as its chunks, which together tile it, in the order of their first rows.

    `numbers` holds for each chunk its offsets, its sizes, the number of its file in `files`, the archive's offset and length in
    bytes, and -1 or the offset of the data in the file once it was looked up.
    """

    __slots__ = ("_longest", "_numbers", "_stride", "dtype", "files", "shape")

    def __init__(self, shape: Shape, dtype: np.dtype[Any], numbers: array[int], files: list[str]) -> None:
        self.shape, self.dtype = shape, dtype
        self._stride, self.files = stride(len(shape)), files
        self._numbers, self._longest = numbers, 1
        if shape and len(self) > 1:
            table = self.table()
            self._longest = int(table[:, len(shape)].max())
            if np.any(np.diff(table[:, 0]) < 0):
                self._numbers = array("q", table[np.argsort(table[:, 0], kind="stable")].tobytes())
        elif shape and len(self):
            self._longest = numbers[len(shape)]

    def __len__(self) -> int:
        return len(self._numbers) // self._stride

    def table(self) -> Array:
        """The numbers, a row for each chunk; a view."""
        return np.frombuffer(self._numbers, np.int64).reshape(-1, self._stride)

    def boxes(self) -> tuple[Shape, Array, Array]:
        """The tensor's shape, and the offsets and sizes of its chunks, [count, dims]; views."""
        dims, table = len(self.shape), self.table()
        return self.shape, table[:, :dims], table[:, dims : 2 * dims]

    @property
    def chunks(self) -> list[Chunk]:
        """All of them as objects: for tensors of which there are few."""
        return [self.chunk(number) for number in range(len(self))]

    def chunk(self, number: int) -> Chunk:
        return Chunk(self.region(number), self.place(number))

    def region(self, number: int) -> Region:
        at, dims = number * self._stride, len(self.shape)
        numbers = self._numbers[at : at + 2 * dims]
        return tuple([slice(numbers[d], numbers[d] + numbers[dims + d]) for d in range(dims)])

    def place(self, number: int) -> Place:
        at = number * self._stride + 2 * len(self.shape)
        return Place(self.files[self._numbers[at]], self._numbers[at + 1], self._numbers[at + 2])

    def data_start(self, number: int) -> int:
        """Where in its file a chunk's data starts, as `found_data` said; -1 if it did not yet."""
        return self._numbers[number * self._stride + self._stride - 1]

    def found_data(self, number: int, start: int) -> None:
        self._numbers[number * self._stride + self._stride - 1] = start

    def touching(self, region: Region) -> Iterator[tuple[int, Region, Region]]:
        """The chunks that share a box with a region: number, region and the box. A tensor of stacked layers has thousands of
        chunks, so only those near the region's rows are looked at."""
        first, last = 0, len(self)
        if region and last > 1:
            numbers, stride = self._numbers, self._stride
            first = bisect_left(range(last), region[0].start - self._longest + 1, key=lambda number: numbers[number * stride])
            last = bisect_left(range(last), region[0].stop, lo=first, key=lambda number: numbers[number * stride])
        for number in range(first, last):
            chunk = self.region(number)
            shared = intersect(chunk, region)
            if shared is not None:
                yield number, chunk, shared


def stride(dims: int) -> int:
    """How many numbers describe a chunk of so many dimensions."""
    return 2 * dims + _PLACE


def check_tiling(name: str, tensor: ChunkedTensor) -> None:
    """Raise UserError unless the chunks cover each element once."""
    if not tiles(*tensor.boxes()):
        raise untiled(name, tensor.shape)


def untiled(name: str, shape: Shape) -> UserError:
    return UserError(
        f"the chunks of `{name}` do not tile its shape {list(shape)}: they overlap, leave holes or stick out",
        hint="the checkpoint is incomplete or damaged",
    )


def tiles(shape: Shape, starts: Array, sizes: Array) -> bool:
    """Do boxes, a row each in both arrays, tile an array of that shape?"""
    whole = np.array(shape, np.int64)
    if np.any(starts < 0) or np.any(sizes < 0) or np.any(starts > whole) or np.any(sizes > whole - starts):
        return False
    volumes = sizes.prod(axis=1) if shape else np.ones(len(starts), np.int64)
    if float(volumes.sum(dtype=np.float64)) > 2 * prod(shape) + 1 or int(volumes.sum()) != prod(shape):
        return False
    if _in_slabs(shape, starts, sizes):
        return True
    return _apart(
        [tuple(slice(a, a + n) for a, n in zip(*box, strict=True)) for box in zip(starts.tolist(), sizes.tolist(), strict=True)]
    )


def _in_slabs(shape: Shape, starts: Array, sizes: Array) -> bool:
    """Do boxes tile an array slab by slab: along the first dimension, each slab along the second, and so on, as megatron-core's
    do? Sorted, so that each dimension is one pass over all slabs."""
    if 0 in sizes or not len(starts):
        return False
    order = np.lexsort(starts.T[::-1]) if shape else np.arange(len(starts))
    starts, stops = starts[order], (starts + sizes)[order]
    new_slab = np.zeros(len(starts), bool)
    new_slab[0] = True
    for dim, size in enumerate(shape):
        low, high = starts[:, dim], stops[:, dim]
        same = ~new_slab[1:] & (low[1:] == low[:-1])
        follows = ~new_slab[1:] & ~same
        last = np.append(new_slab[1:], True)
        in_order = (high[1:] == high[:-1])[same].all() and (low[1:] == high[:-1])[follows].all()
        if not in_order or (low[new_slab] != 0).any() or (high[last] != size).any():
            return False
        new_slab[1:] |= follows
    return bool(new_slab.all())


def _apart(regions: Sequence[Region]) -> bool:
    """Do no two boxes share an element? Only those that share rows are compared."""
    ordered = sorted(regions, key=lambda region: region[0].start if region else 0)
    for number, one in enumerate(ordered):
        for after in range(number + 1, len(ordered)):
            other = ordered[after]
            if one and other[0].start >= one[0].stop:
                break
            if intersect(one, other) is not None:
                return False
    return True
