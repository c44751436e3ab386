"""INT4 as compressed-tensors packs it (`pack-quantized`): eight codes in an int32, the lowest bits first.

A weight is `(code - 8 - zero point) × scale`, rounded once; a group of columns of a row shares its scale. Zero points, if there
are any, are packed likewise, along the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from formats.quantized.scheme import as_float32, bits, block_of, rounded
from formats.spec import Array, Region, Shape

PACKED = 8
"""Codes in an int32."""

_CODES = np.arange(16, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class PackedInt4:
    """Weights of `shape`, of which `group` columns of a row share a scale."""

    shape: Shape
    group: int
    zero_points: bool = False

    name = "INT4, packed"
    largest = 16.0

    def stored(self, region: Region) -> Region:
        *outer, columns = region
        return *outer, slice(columns.start // PACKED, -(-columns.stop // PACKED))

    def plain(self, stored: Region) -> Region:
        *outer, words = stored
        return *outer, slice(words.start * PACKED, min(words.stop * PACKED, self.shape[-1]))

    def parameters(self, region: Region) -> tuple[Region, ...]:
        *outer, rows, columns = region
        groups = slice(columns.start // self.group, -(-columns.stop // self.group))
        words = slice(rows.start // PACKED, -(-rows.stop // PACKED))
        return (*outer, rows, groups), *([(*outer, words, groups)] if self.zero_points else [])

    def decode(self, codes: Array, parameters: Sequence[Array], region: Region, out: Array) -> None:
        zeros, columns = self._zeros(parameters, region), region[-1]
        tables = (_CODES - zeros[..., None]) * as_float32(parameters[0])[..., None]  # [rows, groups, 16]
        starts = np.arange(tables.size // 16).reshape(tables.shape[:-1]) * 16
        index = starts.take(block_of(columns, self.group), axis=-1) + unpacked(codes)[..., : out.shape[-1]]
        bits(out)[...] = bits(rounded(tables, out.dtype)).reshape(-1).take(index, mode="clip")

    def encode(self, values: Array, parameters: Sequence[Array], region: Region, out: Array) -> None:
        group_of = block_of(region[-1], self.group)
        scales, zeros = (each.take(group_of, axis=-1) for each in (as_float32(parameters[0]), self._zeros(parameters, region)))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            codes = np.rint(values.astype(np.float32) / scales) + zeros
        whole = np.zeros((*out.shape[:-1], out.shape[-1] * PACKED), np.uint8)
        whole[..., : codes.shape[-1]] = np.nan_to_num(codes, nan=0).clip(0, 15)
        out.view(np.uint8)[...] = whole[..., 0::2] | whole[..., 1::2] << np.uint8(4)

    def _zeros(self, parameters: Sequence[Array], region: Region) -> Array:
        """Return the code that stands for zero: one for each group."""
        if not self.zero_points:
            return np.full(parameters[0].shape, 8, np.float32)
        rows = region[-2]
        first = rows.start % PACKED
        points = unpacked(parameters[1].swapaxes(-1, -2)).swapaxes(-1, -2)
        return points[..., first : first + rows.stop - rows.start, :].astype(np.float32)


def unpacked(words: Array) -> Array:
    """Return the codes in int32 words: eight times as many along the last axis."""
    halves = np.ascontiguousarray(words).view(np.uint8)
    codes = np.empty((*halves.shape[:-1], halves.shape[-1] * 2), np.uint8)
    codes[..., 0::2], codes[..., 1::2] = halves & 15, halves >> 4
    return codes
