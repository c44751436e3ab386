"""Make the codes of plain weights again, under the scales that they came with: the inverse of `DequantizedReader`.

Codes that a weight's numbers and scales do not determine are stored as they were, under a name of their own (`stored_name`).
Which these are is seen from the scales alone, but for a few schemes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, cast

import ml_dtypes
import numpy as np

from formats.arrays import Buffer, contiguous_regions, same_bits
from formats.errors import UserError
from formats.quantized.reader import BAND
from formats.quantized.scheme import QuantizedWeight, as_float32
from formats.spec import Array, Reader, Region, extent

WORKER_BYTES = 4 * BAND
"""Bytes that each thread holds: numbers, and those that their codes mean."""

_ENDING = ".as_stored"
_SURE = 4
"""The least step between two codes, in steps of the smallest numbers of the weight's dtype, from which rounding loses no code."""


class ChangedError(UserError):
    """Raised for weights that are not what codes and scales mean."""


def stored_name(weight: QuantizedWeight) -> str:
    """Return the name under which the codes of a weight are stored, where numbers and scales do not determine them."""
    return f"{weight.codes.name}{_ENDING}"


class EncodedReader:
    """The codes of weights. `plain` reads the weights; `side_tensors` their scales, and codes that numbers do not determine.

    Raises ChangedError if a number is not what its code means: then the weights are others than they were.
    """

    def __init__(self, plain: Reader, side_tensors: Reader, weights: Iterable[QuantizedWeight]) -> None:
        self._plain, self._side_tensors = plain, side_tensors
        self._weights = {weight.codes.name: weight for weight in weights}
        self.specs = {name: weight.codes for name, weight in self._weights.items()}
        self._local = threading.local()

    def read(self, name: str, region: Region, out: Array) -> None:
        weight = self._weights[name]
        for band in contiguous_regions(extent(region), BAND):
            self._encode(weight, moved(band, region), out[band])

    def _encode(self, weight: QuantizedWeight, stored: Region, out: Array) -> None:
        held, scheme = weight.scheme.plain(stored), weight.scheme
        values, again = (buffer.view(extent(held), weight.spec.dtype) for buffer in self._buffers())
        self._plain.read(weight.spec.name, held, values)
        parameters = weight.read_parameters(self._side_tensors, held)
        if (kept := stored_name(weight)) in self._side_tensors.specs:
            self._side_tensors.read(kept, stored, out)
        else:
            scheme.encode(values, parameters, held, out)
        scheme.decode(out, parameters, held, again)
        if not same_bits(values, again):
            raise ChangedError(
                f"`{weight.spec.name}` is not what it was when its scales were stored",
                hint="write plain numbers instead: `--dtype bf16`",
            )

    def _buffers(self) -> tuple[Buffer, Buffer]:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffer(), Buffer()
        return self._local.buffers

    def close(self) -> None:
        pass


def comes_back(weight: QuantizedWeight, raw: Reader) -> bool:
    """Return whether `encode` makes every code of a weight again. Reads the codes only where the scales leave a doubt.

    Raises UserError for scales that are not finite.
    """
    return _is_sure(weight, raw) or all(_region_comes_back(weight, raw, band) for band in _bands(weight.codes.shape))


def _bands(shape: tuple[int, ...]) -> Iterable[Region]:
    return contiguous_regions(shape, BAND)


def _is_sure(weight: QuantizedWeight, raw: Reader) -> bool:
    """Do the scales alone tell that different codes are different numbers?"""
    scales, step = weight.parameters[0], weight.scheme.step
    least = np.inf
    for band in _bands(scales.shape):
        values = np.empty(extent(band), scales.dtype)
        raw.read(scales.name, band, values)
        weight.check_scales(values)
        least = min(least, float(np.abs(as_float32(values)).min(initial=np.inf)))
    smallest = cast("Any", ml_dtypes.finfo(weight.spec.dtype)).smallest_subnormal
    return least * step >= _SURE * float(smallest)


def _region_comes_back(weight: QuantizedWeight, raw: Reader, stored: Region) -> bool:
    held = weight.scheme.plain(stored)
    codes, again = (np.zeros(extent(stored), weight.codes.dtype) for _ in range(2))
    values = np.empty(extent(held), weight.spec.dtype)
    raw.read(weight.codes.name, stored, codes)
    parameters = weight.read_parameters(raw, held)
    weight.scheme.decode(codes, parameters, held, values)
    weight.scheme.encode(values, parameters, held, again)
    return same_bits(codes, again)


def moved(band: Region, origin: Region) -> Region:
    """Return a region counted from the start of `origin` in the tensor's own indices."""
    return tuple(slice(part.start + first.start, part.stop + first.start) for part, first in zip(band, origin, strict=True))
