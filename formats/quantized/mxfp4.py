"""MXFP4 as GPT-OSS stores it: 4-bit codes, 32 in a row share a scale that is a power of 2.

Codes are [experts, out, in / 32, 16] with two in a byte, the low half first; scales are [experts, out, in / 32]. The weight that
they stand for is [experts, in, out], as transformers' `Mxfp4Config(dequantize=True)` gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from formats.arrays import contiguous_regions
from formats.quantized.rounding import e2m1_codes
from formats.quantized.scheme import CHUNK, as_float32, bits, rounded
from formats.spec import Array, Region

GROUP, BYTES = 32, 16
_ROWS = 16
"""Rows that are transposed at a time: more leave the processor's cache."""

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """The one scheme of its kind: it has nothing to choose."""

    name = "MXFP4"
    largest = 6.0
    step = 0.5

    def stored(self, region: Region) -> Region:
        expert, inner, rows = region
        return expert, rows, slice(inner.start // GROUP, -(-inner.stop // GROUP)), slice(0, BYTES)

    def plain(self, stored: Region) -> Region:
        expert, rows, groups, _ = stored
        return expert, slice(groups.start * GROUP, groups.stop * GROUP), rows

    def parameters(self, region: Region) -> tuple[Region, ...]:
        return (self.stored(region)[:3],)

    def decode(self, codes: Array, parameters: Sequence[Array], region: Region, out: Array) -> None:  # noqa: ARG002 - of all schemes
        pairs, starts = _pairs(out.dtype), parameters[0].view(np.uint8).astype(np.intp) * 256
        for part in contiguous_regions(codes.shape[:2], _ROWS):
            numbers = pairs.take(starts[part][..., None] + codes[part], mode="clip").view(np.uint16)
            expert, rows = part
            bits(out)[expert, :, rows] = numbers.reshape(*numbers.shape[:2], -1).swapaxes(1, 2)

    def encode(self, values: Array, parameters: Sequence[Array], region: Region, out: Array) -> None:  # noqa: ARG002 - of all schemes
        scales, groups = by_group(parameters[0].view(np.uint8)), groups_of(values)
        experts, count, _, rows = groups.shape
        for expert, some in contiguous_regions((experts, count), max(1, CHUNK // (GROUP * rows))):
            codes = e2m1_codes(groups[expert, some], scales[expert, some])
            out[expert, :, some] = (codes[:, :, 0::2] | codes[:, :, 1::2] << np.uint8(4)).transpose(0, 3, 1, 2)


def groups_of(values: Array) -> Array:
    """Return weights [experts, in, out] as [experts, in / 32, 32, out], without a copy."""
    experts, inner, rows = values.shape
    return values.reshape(experts, inner // GROUP, GROUP, rows)


def by_group(scales: Array) -> Array:
    """Return scales [experts, out, in / 32] as those of `groups_of`, [experts, in / 32, 1, out], without a copy."""
    return scales.swapaxes(1, 2)[:, :, None]


@cache
def _pairs(dtype: np.dtype[Any]) -> Array:
    """Return the two numbers of each byte under each scale, in one uint32: [256 scales × 256 bytes]."""
    scales, code = as_float32(np.arange(256, dtype=np.uint8)), np.arange(256)
    pairs = np.stack([_VALUES[code & 15], _VALUES[code >> 4]], axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return rounded(pairs * scales[:, None, None], dtype).reshape(-1).view(np.uint32)
