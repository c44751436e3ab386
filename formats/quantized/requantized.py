"""Quantize plain weights anew, with scales by the format's own rule, and measure what that loses.

FP8: the largest number of a block becomes the largest code, 448 (DeepSeek-V3's report, § 3.3). MXFP4: the exponent that 32
numbers share is that of the largest, less that of the largest code (OCP Microscaling Formats 1.0, § 6.3).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from formats.arrays import Buffer, bands, contiguous_regions, copy
from formats.errors import UserError
from formats.quantized.encoded import moved
from formats.quantized.fp8 import cut
from formats.quantized.mxfp4 import BYTES, GROUP, Mxfp4, by_group, groups_of
from formats.quantized.reader import BAND
from formats.quantized.rounding import MAGNITUDE, e4m3_codes
from formats.quantized.scheme import CHUNK, QuantizedWeight, as_float32, bits, block_of
from formats.spec import Array, Reader, Region, extent, intersect, relative_to

WORKER_BYTES = 9 * BAND
"""Bytes that each thread holds: numbers, read and decoded again, their magnitudes or those that a plan moves, and codes."""

FP8_LARGEST = 448.0
_FP4_EXPONENT = np.uint16(2)
"""That of its largest code, 6."""

_NOT_FINITE = np.uint16(255)
"""The exponent of an infinity and of NaN, in bf16 as in a scale."""


class Quantizer(Protocol):
    """A rule for scales and codes."""

    @property
    def at_once(self) -> int:
        """How many scales are made at a time."""
        ...

    def codes_of(self, scales: Region, codes: tuple[int, ...]) -> Region:
        """Return the region of codes that a region of scales belongs to; `codes` is the shape of all."""
        ...

    def scale(self, values: Array, scales: Array) -> None:
        """Write the scales of whole groups of bf16 numbers. One that has an infinity or NaN among them is not finite."""
        ...

    def encode(self, values: Array, scales: Array, region: Region, out: Array) -> None:
        """Write the codes of the finite numbers of a region of the weight under its scales: those that `scale` gives."""
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

    def scale(self, values: Array, scales: Array) -> None:
        """A block of zeros has the scale 1."""
        raw, starts = bits(values), range(0, values.shape[1], self.block[1])
        for number, rows in enumerate(bands(slice(0, len(raw)), self.block[0])):
            largest = np.maximum.reduceat((raw[rows] & MAGNITUDE).max(axis=0), starts).view(values.dtype).astype(np.float32)
            scales[number] = np.where(largest == 0, np.float32(1), largest / np.float32(FP8_LARGEST))

    def encode(self, values: Array, scales: Array, region: Region, out: Array) -> None:
        rows, columns = region
        wide = scales.take(block_of(columns, self.block[1]), axis=1)
        for part, scale in zip(cut(rows, self.block[0]), wide, strict=True):
            e4m3_codes(values[part], scale, out.view(np.uint8)[part])


@dataclass(frozen=True, slots=True)
class Mxfp4Groups:
    """An exponent of 2 for 32 numbers of a row of experts' weights, which are stored [experts, in, out]."""

    at_once = BAND // GROUP

    def codes_of(self, scales: Region, codes: tuple[int, ...]) -> Region:  # noqa: ARG002 - of all rules
        return *scales, slice(0, BYTES)

    def scale(self, values: Array, scales: Array) -> None:
        exponents = (bits(groups_of(values)) & MAGNITUDE).max(axis=2, keepdims=True) >> np.uint16(7)
        chosen = np.where(exponents == _NOT_FINITE, _NOT_FINITE, exponents.clip(_FP4_EXPONENT) - _FP4_EXPONENT)
        by_group(scales)[...] = chosen

    def encode(self, values: Array, scales: Array, region: Region, out: Array) -> None:
        Mxfp4().encode(values, [scales], region, out)


@dataclass(slots=True)
class RoundingError:
    """The squares of what quantizing changed and of the numbers themselves, by weight. Thread-safe."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    _lock: Any = field(default_factory=threading.Lock)

    def add(self, name: str, values: Array, again: Array) -> None:
        lost = all_of_it = 0.0
        for part in contiguous_regions(values.shape, CHUNK):
            numbers: Any = values[part].astype(np.float32).reshape(-1)
            difference: Any = numbers - again[part].astype(np.float32).reshape(-1)
            lost, all_of_it = lost + float(np.dot(difference, difference)), all_of_it + float(np.dot(numbers, numbers))
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


class _Buffers:
    """A thread's memory: numbers, their codes, and what the codes mean."""

    def __init__(self) -> None:
        self.values, self.codes, self.again = Buffer(), Buffer(), Buffer()


class RequantizedReader:
    """The codes and scales of weights that `plain` reads. What is read of the codes is added to `error`."""

    def __init__(self, plain: Reader, weights: Iterable[QuantizedWeight], quantizer: Quantizer) -> None:
        self._plain, self._quantizer, self.error = plain, quantizer, RoundingError()
        self._local = threading.local()
        self._weights = {spec.name: weight for weight in weights for spec in (weight.codes, weight.parameters[0])}
        self.specs = {name: w.codes if name == w.codes.name else w.parameters[0] for name, w in self._weights.items()}

    def read(self, name: str, region: Region, out: Array) -> None:
        weight = self._weights[name]
        is_codes = name == weight.codes.name
        scales = weight.scheme.parameters(weight.scheme.plain(region))[0] if is_codes else region
        for band in contiguous_regions(extent(scales), self._quantizer.at_once):
            held = moved(band, scales)
            stored = self._quantizer.codes_of(held, weight.codes.shape)
            values = self._values(weight, weight.scheme.plain(stored))
            new = self._scales(weight, values, held)
            if not is_codes:
                copy(out[band], new)
            elif part := intersect(stored, region):
                wanted = weight.scheme.plain(part)
                inside, grid = relative_to(wanted, weight.scheme.plain(stored)), weight.scheme.parameters(wanted)[0]
                codes = self._encode(weight, values[inside], new[relative_to(grid, held)], wanted)
                copy(out[relative_to(part, region)], codes)

    def _values(self, weight: QuantizedWeight, region: Region) -> Array:
        values = self._buffers.values.view(extent(region), weight.spec.dtype)
        self._plain.read(weight.spec.name, region, values)
        return values

    def _encode(self, weight: QuantizedWeight, values: Array, scales: Array, region: Region) -> Array:
        """Return the codes of a region's numbers, and add what they change to `error`."""
        codes = self._buffers.codes.view(extent(weight.scheme.stored(region)), weight.codes.dtype)
        self._quantizer.encode(values, scales, region, codes)
        again = self._buffers.again.view(values.shape, values.dtype)
        weight.scheme.decode(codes, [scales], region, again)
        self.error.add(weight.spec.name, values, again)
        return codes

    @property
    def _buffers(self) -> _Buffers:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = _Buffers()
        return self._local.buffers

    def _scales(self, weight: QuantizedWeight, values: Array, region: Region) -> Array:
        """Return the scales of a region. Raises UserError for a weight with numbers that are not finite."""
        scales = np.empty(extent(region), weight.parameters[0].dtype)
        self._quantizer.scale(values, scales)
        if not np.isfinite(as_float32(scales)).all():
            raise UserError(
                f"`{weight.spec.name}` holds numbers that are not finite: no scale fits them",
                hint="training had diverged when this checkpoint was saved, or a file is damaged; take an earlier one",
            )
        return scales

    def close(self) -> None:
        pass
