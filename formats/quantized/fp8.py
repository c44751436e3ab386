"""FP8 with one scale for each block: DeepSeek's blocks of 128 × 128, whole rows, or the whole tensor.

A weight is `code × scale`, multiplied in fp32 and rounded once, as in transformers' `Fp8Dequantize`. The blocks at the edges may
be smaller: a weight of [576, 7168] has [5, 56] scales of blocks of 128.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np

from formats.arrays import bands
from formats.quantized.scheme import as_float32, bits, block_of, largest, rounded
from formats.spec import DTYPES, Array, Region, Shape, extent

_WORTH_A_TABLE = 1024
"""Weights of a block from which a table of all 256 codes times its scale is faster than a multiplication for each."""

_Part = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Fp8:
    """A scale for each block of [rows, columns] of the last two axes, in a tensor of shape `scales`."""

    name: str
    dtype: np.dtype[Any]
    """Of the codes: e4m3 or e5m2."""

    block: tuple[int, int]
    scales: Shape

    @property
    def largest(self) -> float:
        return largest(self.dtype)

    @property
    def step(self) -> float:
        """That of the smallest codes. Of e5m2, several codes are one infinity or no number."""
        return 2.0**-9 if self.dtype == DTYPES["fp8_e4m3"] else 0.0

    def stored(self, region: Region) -> Region:
        return region

    def plain(self, stored: Region) -> Region:
        return stored

    def parameters(self, region: Region) -> tuple[Region, ...]:
        grid = self._grid(region)
        if len(self.scales) >= 2:
            return (grid,)
        return (grid[-2:-1] if self.scales else (),)

    def decode(self, codes: Array, parameters: Sequence[Array], region: Region, out: Array) -> None:
        scales, target, size = self._scales(parameters, region), bits(out), out.dtype
        if prod(self.block) < _WORTH_A_TABLE:
            numbers = self._numbers.take(codes.view(np.uint8), mode="clip")
            target[...] = bits(rounded(numbers * self._spread(scales, region), size))
            return
        tables, raw = bits(self._tables(scales, size)), codes.view(np.uint8)
        for index, part in self._blocks(region):
            target[part] = tables[index].take(raw[part], mode="clip")

    def encode(self, values: Array, parameters: Sequence[Array], region: Region, out: Array) -> None:
        scales, target, size = self._scales(parameters, region), out.view(np.uint8), values.dtype
        if prod(self.block) < _WORTH_A_TABLE:
            with np.errstate(divide="ignore", invalid="ignore"):
                quotients = values.astype(np.float32) / self._spread(scales, region)
            target[...] = rounded(quotients, self.dtype).view(np.uint8)
            return
        tables, raw = bits(self._tables(scales, size)), bits(values)
        inverse = np.zeros(1 << 16, np.uint8)
        for index, part in self._blocks(region):
            inverse[tables[index]] = _CODES
            target[part] = inverse.take(raw[part], mode="clip")

    def _tables(self, scales: Array, dtype: np.dtype[Any]) -> Array:
        """Return every code times every scale: [..., 256]."""
        return rounded(self._numbers * scales[..., None], dtype)

    @property
    def _numbers(self) -> Array:
        """What each of the 256 codes is under a scale of 1."""
        return _CODES.view(self.dtype).astype(np.float32)

    def _grid(self, region: Region) -> Region:
        """Return the blocks that a region touches."""
        sizes = (*[1] * (len(region) - 2), *self.block)
        return tuple(slice(part.start // size, -(-part.stop // size)) for part, size in zip(region, sizes, strict=True))

    def _scales(self, parameters: Sequence[Array], region: Region) -> Array:
        return as_float32(parameters[0]).reshape(extent(self._grid(region)))

    def _spread(self, scales: Array, region: Region) -> Array:
        """Return the scale of each weight of a region."""
        for axis, size in ((-2, self.block[0]), (-1, self.block[1])):
            scales = scales.take(block_of(region[axis], size), axis=axis)
        return scales

    def _blocks(self, region: Region) -> Iterator[tuple[tuple[int, ...], _Part]]:
        """Yield the blocks that a region touches: the index among their scales, and what the block has of the region."""
        rows, columns = (list(cut(part, size)) for part, size in zip(region[-2:], self.block, strict=True))
        for index in np.ndindex(extent(region[:-2])):
            for row, column in product(range(len(rows)), range(len(columns))):
                yield (*index, row, column), (*index, rows[row], columns[column])


_CODES = np.arange(256, dtype=np.uint8)


def cut(part: slice, size: int) -> Iterator[slice]:
    """Divide a range at multiples of `size`, counted from its start."""
    first = min(part.stop, (part.start // size + 1) * size)
    for band in (slice(part.start, first), *bands(slice(first, part.stop), size)):
        yield slice(band.start - part.start, band.stop - part.start)
