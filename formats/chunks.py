"""Store the chunks of a distributed tensor as one array of numbers, and check that they tile the tensor.

A checkpoint has hundreds of thousands of chunks. An object for each would take hundreds of MiB, so objects are created on
request. No file is opened.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from formats.errors import UserError
from formats.spec import Array, Region, Shape, intersect

_LOCATION_NUMBERS = 4  # numbers of a chunk after its region: file, offset, length, and the offset of its data or -1


class ArchiveLocation(NamedTuple):
    """The location of an archive: bytes `offset` to `offset + length` of a file. `compressed` names the kind, if it is."""

    file: str
    offset: int
    length: int
    compressed: str = ""


class Chunk(NamedTuple):
    """A region of a tensor, and the location of the archive that holds it."""

    region: Region
    location: ArchiveLocation


class Overlap(NamedTuple):
    """The intersection of a chunk and a region, relative to the start of each."""

    number: int
    """The chunk's."""

    shape: Shape
    """The whole chunk's."""

    in_chunk: Region
    in_region: Region


class ChunkedTensor:
    """A tensor as chunks that tile it, sorted by their first rows.

    `numbers` holds for each chunk its offsets [dims], its sizes [dims], the index of its file in `files`, the archive's offset
    and length in bytes, and the byte offset of the data in the file, -1 until it is known.
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
        """Return the numbers, [chunks, stride]; a view."""
        return np.frombuffer(self._numbers, np.int64).reshape(-1, self._stride)

    def bounds(self) -> tuple[Shape, Array, Array]:
        """Return the tensor's shape, and the offsets and sizes of its chunks, [chunks, dims] each; views."""
        dims, table = len(self.shape), self.table()
        return self.shape, table[:, :dims], table[:, dims : 2 * dims]

    @property
    def chunks(self) -> list[Chunk]:
        """All chunks as objects. Meant for tensors with few chunks."""
        return [self.chunk(number) for number in range(len(self))]

    def chunk(self, number: int) -> Chunk:
        return Chunk(self.region(number), self.location(number))

    def region(self, number: int) -> Region:
        at, dims = number * self._stride, len(self.shape)
        numbers = self._numbers[at : at + 2 * dims]
        return tuple([slice(numbers[d], numbers[d] + numbers[dims + d]) for d in range(dims)])

    def file(self, number: int) -> str:
        return self.files[self._numbers[number * self._stride + 2 * len(self.shape)]]

    def location(self, number: int) -> ArchiveLocation:
        at = number * self._stride + 2 * len(self.shape)
        return ArchiveLocation(self.files[self._numbers[at]], self._numbers[at + 1], self._numbers[at + 2])

    def data_start(self, number: int) -> int:
        """Return the byte offset of a chunk's data in its file, or -1 before `set_data_start`."""
        return self._numbers[number * self._stride + self._stride - 1]

    def set_data_start(self, number: int, start: int) -> None:
        self._numbers[number * self._stride + self._stride - 1] = start

    def overlapping(self, region: Region) -> Iterator[Overlap]:
        """Yield what a region shares with each chunk that it overlaps.

        A tensor of stacked layers has thousands of chunks, so bisection selects those near the region's rows.
        """
        numbers, stride, dims = self._numbers, self._stride, len(region)
        first, last = 0, len(self)
        if region and last > 1:
            first = bisect_left(range(last), region[0].start - self._longest + 1, key=lambda number: numbers[number * stride])
            last = bisect_left(range(last), region[0].stop, lo=first, key=lambda number: numbers[number * stride])
        wanted = [(dim, part.start, part.stop) for dim, part in enumerate(region)]
        for number in range(first, last):
            at = number * stride
            for dim, start, stop in wanted:  # most chunks end here; a call for each takes twice as long
                origin = numbers[at + dim]
                if origin >= stop or origin + numbers[at + dims + dim] <= start:
                    break
            else:
                if overlap := self._overlap(number, wanted):
                    yield overlap

    def _overlap(self, number: int, region: Sequence[tuple[int, int, int]]) -> Overlap | None:
        """Return what a chunk shares with a region, given as dimensions with start and stop; None if they share nothing."""
        numbers, at, dims = self._numbers, number * self._stride, len(region)
        in_chunk: list[slice] = []
        in_region: list[slice] = []
        for dim, start, stop in region:
            origin, end = numbers[at + dim], numbers[at + dim] + numbers[at + dims + dim]
            low, high = max(start, origin), min(stop, end)
            if low >= high:
                return None
            in_chunk.append(slice(low - origin, high - origin))
            in_region.append(slice(low - start, high - start))
        return Overlap(number, tuple(numbers[at + dims : at + 2 * dims]), tuple(in_chunk), tuple(in_region))


def stride(dims: int) -> int:
    """Return how many numbers describe a chunk of a tensor with `dims` dimensions."""
    return 2 * dims + _LOCATION_NUMBERS


def check_tiling(name: str, tensor: ChunkedTensor) -> None:
    """Raise UserError unless the chunks cover each element exactly once."""
    if not tiles(*tensor.bounds()):
        raise tiling_error(name, tensor.shape)


def tiling_error(name: str, shape: Shape) -> UserError:
    return UserError(
        f"the chunks of `{name}` do not tile its shape {list(shape)}: they overlap, leave gaps or exceed it",
        hint="the checkpoint is incomplete or damaged",
    )


def tiles(shape: Shape, starts: Array, sizes: Array) -> bool:
    """Do regions tile an array of that shape? `starts` and `sizes` are [regions, dims] each."""
    whole = np.array(shape, np.int64)
    if np.any(starts < 0) or np.any(sizes < 0) or np.any(starts > whole) or np.any(sizes > whole - starts):
        return False
    volumes = sizes.prod(axis=1) if shape else np.ones(len(starts), np.int64)
    if float(volumes.sum(dtype=np.float64)) > 2 * prod(shape) + 1 or int(volumes.sum()) != prod(shape):
        return False
    if _in_slabs(shape, starts, sizes):
        return True
    return _disjoint(
        [tuple(slice(a, a + n) for a, n in zip(*box, strict=True)) for box in zip(starts.tolist(), sizes.tolist(), strict=True)]
    )


def _in_slabs(shape: Shape, starts: Array, sizes: Array) -> bool:
    """Do regions tile an array slab by slab, along the first dimension, each slab along the second, and so on?

    Chunks of megatron-core do. The regions are sorted, so that each dimension takes one pass over all slabs.
    """
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


def _disjoint(regions: Sequence[Region]) -> bool:
    """Are all regions disjoint? Only regions that share rows are compared."""
    ordered = sorted(regions, key=lambda region: region[0].start if region else 0)
    for number, region in enumerate(ordered):
        for after in range(number + 1, len(ordered)):
            other = ordered[after]
            if region and other[0].start >= region[0].stop:
                break
            if intersect(region, other) is not None:
                return False
    return True
