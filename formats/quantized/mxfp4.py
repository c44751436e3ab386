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

from formats.quantized.scheme import as_float32, bits, rounded
from formats.spec import Array, Region

GROUP, BYTES = 32, 16
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_CODE_OF_TWICE = np.array([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], np.uint8)
"""The code of a number without its sign, by twice the number."""


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """The one scheme of its kind: it has nothing to choose."""

    name = "MXFP4"
    largest = 6.0

    def stored(self, region: Region) -> Region:
        expert, inner, rows = region
        return expert, rows, slice(inner.start // GROUP, -(-inner.stop // GROUP)), slice(0, BYTES)

    def plain(self, stored: Region) -> Region:
        expert, rows, groups, _ = stored
        return expert, slice(groups.start * GROUP, groups.stop * GROUP), rows

    def parameters(self, region: Region) -> tuple[Region, ...]:
        return (self.stored(region)[:3],)

    def decode(self, codes: Array, parameters: Sequence[Array], region: Region, out: Array) -> None:  # noqa: ARG002 - of all schemes
        index = parameters[0].view(np.uint8)[..., None].astype(np.intp) * 256 + codes
        pairs = _pairs(out.dtype).take(index, mode="clip")
        experts, rows, groups, _ = codes.shape
        bits(out)[...] = pairs.view(np.uint16).reshape(experts, rows, groups * GROUP).swapaxes(1, 2)

    def encode(self, values: Array, parameters: Sequence[Array], region: Region, out: Array) -> None:  # noqa: ARG002 - of all schemes
        experts, rows, groups, _ = out.shape
        numbers = values.swapaxes(1, 2).reshape(experts, rows, groups, GROUP).astype(np.float32)
        exponents = parameters[0].view(np.uint8).astype(np.int32) - 127
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            twice = np.ldexp(np.abs(numbers), 1 - exponents[..., None])
            codes = _CODE_OF_TWICE.take(np.nan_to_num(twice, nan=0, posinf=0).clip(0, 12).astype(np.intp))
        codes |= np.signbit(numbers).astype(np.uint8) << np.uint8(3)
        out[...] = codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)


@cache
def _pairs(dtype: np.dtype[Any]) -> Array:
    """Return the two numbers of each byte under each scale, in one uint32: [256 scales × 256 bytes]."""
    scales, code = as_float32(np.arange(256, dtype=np.uint8)), np.arange(256)
    pairs = np.stack([_VALUES[code & 15], _VALUES[code >> 4]], axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return rounded(pairs * scales[:, None, None], dtype).reshape(-1).view(np.uint32)
