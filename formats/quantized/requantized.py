"""Quantize plain weights anew, with scales by the format's own rule, and measure what that loses.

FP8: the largest number of a block becomes the largest code, 448 (DeepSeek-V3's report, § 3.3). MXFP4: the exponent that 32
numbers share is that of the largest, less that of the largest code (OCP Microscaling Formats 1.0, § 6.3).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from formats.arrays import contiguous_regions, copy
from formats.quantized.encoded import moved
from formats.quantized.mxfp4 import BYTES, GROUP
from formats.quantized.reader import BAND
from formats.quantized.scheme import QuantizedWeight
from formats.spec import Array, Reader, Region, extent, intersect, relative_to

WORKER_BYTES = 18 * BAND
"""Bytes that each thread holds, measured: numbers in fp32 and what is made of them."""

FP8_LARGEST = 448.0
_FP4_LARGEST, _FP4_EXPONENT = 6.0, 2
_BIAS = 127


class Quantizer(Protocol):
    """A rule for scales and codes."""

    @property
    def at_once(self) -> int:
        """How many scales are made at a time."""
        ...

    def codes_of(self, scales: Region, codes: tuple[int, ...]) -> Region:
        """Return the region of codes that a region of scales belongs to; `codes` is the shape of all."""
        ...

    def quantize(self, values: Array, codes: Array, scales: Array) -> None:
        """Write the codes and the scales of whole groups of numbers."""
        ...


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """A scale for each block of [rows, columns] of a matrix, in fp32."""

    block: tuple[int, int]

    @property
    def at_once(self) -> int:
        return max(1, BAND // (self.block[0] * self.block[1]))

    def codes_of(self, scales: Region, codes: tuple[int, ...]) -> Region:
        sizes = zip(scales, self.block, codes, strict=True)
        return tuple(slice(part.start * size, min(part.stop * size, most)) for part, size, most in sizes)

    def quantize(self, values: Array, codes: Array, scales: Array) -> None:
        """A block of zeros has the scale 1."""
        numbers = values.astype(np.float32)
        height, width = values.shape
        rows, columns = self.block
        largest: Array = np.maximum.reduceat(np.abs(numbers), range(0, height, rows), axis=0)
        largest = np.maximum.reduceat(largest, range(0, width, columns), axis=1)
        np.copyto(scales, np.where(largest > 0, largest / np.float32(FP8_LARGEST), np.float32(1)))
        np.divide(numbers, scales.repeat(rows, axis=0)[:height].repeat(columns, axis=1)[:, :width], out=numbers)
        copy(codes, numbers.clip(-FP8_LARGEST, FP8_LARGEST).astype(codes.dtype))


@dataclass(frozen=True, slots=True)
class Mxfp4Groups:
    """An exponent of 2 for 32 numbers of a row of experts' weights, which are stored [experts, in, out]."""

    at_once = BAND // GROUP

    def codes_of(self, scales: Region, codes: tuple[int, ...]) -> Region:  # noqa: ARG002 - of all rules
        return *scales, slice(0, BYTES)

    def quantize(self, values: Array, codes: Array, scales: Array) -> None:
        experts, inner, rows = values.shape
        numbers = values.swapaxes(1, 2).reshape(experts, rows, inner // GROUP, GROUP).astype(np.float32)
        largest = np.abs(numbers).max(axis=-1)
        exponents = np.where(largest > 0, np.frexp(largest)[1] - 1 - _FP4_EXPONENT, -_BIAS).clip(-_BIAS, _BIAS)
        scales[...] = exponents + _BIAS
        scaled = np.ldexp(numbers, -exponents[..., None]).clip(-_FP4_LARGEST, _FP4_LARGEST)
        nibbles = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        codes[...] = nibbles[..., 0::2] | nibbles[..., 1::2] << np.uint8(4)


@dataclass(slots=True)
class RoundingError:
    """The squares of what quantizing changed and of the numbers themselves, by weight. Thread-safe."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    _lock: Any = field(default_factory=threading.Lock)

    def add(self, name: str, values: Array, again: Array) -> None:
        numbers = values.astype(np.float32)
        difference: Any = (numbers - again.astype(np.float32)).reshape(-1)
        lost, all_of_it = float(np.dot(difference, difference)), float(np.dot(numbers.reshape(-1), numbers.reshape(-1)))
        with self._lock:
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = before[0] + lost, before[1] + all_of_it

    @property
    def overall(self) -> float:
        """The root of the mean square, relative to that of the numbers."""
        return _relative(*map(sum, zip(*self.sums.values(), strict=True))) if self.sums else 0.0

    @property
    def worst(self) -> tuple[str, float]:
        """The weight with the largest relative error, and that."""
        return max(((name, _relative(*sums)) for name, sums in self.sums.items()), key=lambda item: item[1])


def _relative(lost: float, all_of_it: float) -> float:
    return (lost / all_of_it) ** 0.5 if all_of_it else 0.0


class _Groups(NamedTuple):
    """The numbers of whole groups, their codes and their scales."""

    values: Array
    codes: Array
    scales: Array


class RequantizedReader:
    """The codes and scales of weights that `plain` reads. What is read of the codes is added to `error`."""

    def __init__(self, plain: Reader, weights: Iterable[QuantizedWeight], quantizer: Quantizer) -> None:
        self._plain, self._quantizer, self.error = plain, quantizer, RoundingError()
        self._weights = {spec.name: weight for weight in weights for spec in (weight.codes, weight.parameters[0])}
        self.specs = {name: w.codes if name == w.codes.name else w.parameters[0] for name, w in self._weights.items()}

    def read(self, name: str, region: Region, out: Array) -> None:
        weight = self._weights[name]
        is_codes = name == weight.codes.name
        scales = weight.scheme.parameters(weight.scheme.plain(region))[0] if is_codes else region
        for band in contiguous_regions(extent(scales), self._quantizer.at_once):
            held = moved(band, scales)
            stored = self._quantizer.codes_of(held, weight.codes.shape)
            made = self._quantize(weight, stored, held)
            if not is_codes:
                copy(out[band], made.scales)
            elif part := intersect(stored, region):
                copy(out[relative_to(part, region)], made.codes[relative_to(part, stored)])
                self._measure(weight, part, stored, made)

    def _quantize(self, weight: QuantizedWeight, stored: Region, scales: Region) -> _Groups:
        held = weight.scheme.plain(stored)
        values = np.empty(extent(held), weight.spec.dtype)
        self._plain.read(weight.spec.name, held, values)
        codes, new = np.empty(extent(stored), weight.codes.dtype), np.empty(extent(scales), weight.parameters[0].dtype)
        self._quantizer.quantize(values, codes, new)
        return _Groups(values, codes, new)

    def _measure(self, weight: QuantizedWeight, part: Region, stored: Region, made: _Groups) -> None:
        """Add the error of that part of whole groups that was asked for: the rest belongs to another read."""
        held, wanted = weight.scheme.plain(stored), weight.scheme.plain(part)
        again = np.empty_like(made.values)
        weight.scheme.decode(made.codes, [made.scales], held, again)
        inside = relative_to(wanted, held)
        self.error.add(weight.spec.name, made.values[inside], again[inside])

    def close(self) -> None:
        pass
