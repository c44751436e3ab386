"""What a scheme of quantization is: which codes and scales a region of a weight takes, and both directions between them.

A scheme is local: a region of a weight needs that region of the codes and of the scales, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import ml_dtypes
import numpy as np

from formats.errors import UserError
from formats.spec import Array, Reader, Region, TensorSpec, dtype_name, extent

BF16 = np.dtype(ml_dtypes.bfloat16)
CHUNK = 1 << 16
"""Numbers that are made at a time, so that what is between stays in the processor's cache."""

_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)


class Scheme(Protocol):
    """How the weights of one shape are stored. `parameters` are the regions of the scales, and of the zero points if any."""

    @property
    def name(self) -> str:
        """Its name in notes and messages."""
        ...

    @property
    def largest(self) -> float:
        """The largest finite code, by which a scale is multiplied."""
        ...

    @property
    def step(self) -> float:
        """The least distance of two codes' numbers under a scale of 1; 0 where codes hold what no number says."""
        ...

    def stored(self, region: Region) -> Region:
        """Return the region of the codes that holds a region of the weight, and perhaps more."""
        ...

    def plain(self, stored: Region) -> Region:
        """Return the region of the weight that a region of the codes holds."""
        ...

    def parameters(self, region: Region) -> tuple[Region, ...]:
        """Return the region of each parameter that a region of the weight takes."""
        ...

    def decode(self, codes: Array, parameters: Sequence[Array], region: Region, out: Array) -> None:
        """Write the numbers of a `region` of whole codes into `out`, rounded to its dtype (bf16 or fp16)."""
        ...

    def encode(self, values: Array, parameters: Sequence[Array], region: Region, out: Array) -> None:
        """Write the codes of `values`, under the scales that they had, into `out`: the inverse of `decode`.

        Where a value is no code's, or several codes have it, the code written is some other: decode it to find out.
        """
        ...


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight and the tensors that it is stored as."""

    spec: TensorSpec
    """The plain weight: bf16, or fp16 where its scales are."""

    codes: TensorSpec
    parameters: tuple[TensorSpec, ...]
    """Scales, and zero points if there are any."""

    scheme: Scheme
    shape: TensorSpec | None = None
    """A tensor that holds the shape of the weight."""

    others: tuple[TensorSpec, ...] = ()
    """What belongs to it and does not change its numbers: scales of activations."""

    @property
    def side_tensors(self) -> tuple[TensorSpec, ...]:
        """All of its stored tensors but the codes."""
        return (*self.parameters, *([self.shape] if self.shape else []), *self.others)

    def read_parameters(self, reader: Reader, region: Region) -> list[Array]:
        """Read what `decode` and `encode` take for a region of the weight. Raises UserError for a scale that is not finite."""
        values: list[Array] = []
        for spec, wanted in zip(self.parameters, self.scheme.parameters(region), strict=True):
            values.append(np.empty(extent(wanted), spec.dtype))
            reader.read(spec.name, wanted, values[-1])
        self.check_scales(values[0])
        return values

    def check_scales(self, scales: Array) -> None:
        """Raise UserError for a scale that is not finite."""
        if not np.isfinite(as_float32(scales)).all():
            raise UserError(
                f"`{self.parameters[0].name}` holds scales that are not finite",
                hint="the file is damaged, or the model's quantization failed; fetch it again",
            )

    def check_shape(self, reader: Reader) -> None:
        """Raise UserError if the stored shape is another than the one that codes and scales have."""
        if self.shape is None:
            return
        stored = np.empty(self.shape.shape, self.shape.dtype)
        reader.read(self.shape.name, self.shape.full_region, stored)
        if stored.tolist() != list(self.spec.shape):
            raise UserError(
                f"`{self.shape.name}` holds {stored.tolist()}, but codes and scales are of a weight of {list(self.spec.shape)}",
                hint="the file is damaged; fetch it again",
            )

    def check_values(self, values: Array, parameters: Sequence[Array]) -> None:
        """Raise UserError if a finite code times its scale is more than the weight's dtype can hold."""
        scales: Any = as_float32(parameters[0])
        most = max(float(scales.max(initial=0)), -float(scales.min(initial=0))) * self.scheme.largest
        if most > largest(self.spec.dtype) and np.isinf(values).any():
            raise UserError(
                f"`{self.codes.name}` with `{self.parameters[0].name}` has numbers up to `{most:.6g}`, "
                f"which {dtype_name(self.spec.dtype)} cannot hold",
                hint="the scales are damaged; fetch the file again",
            )


def largest(dtype: np.dtype[Any]) -> float:
    """Return the largest finite number of a dtype."""
    return float(cast("Any", ml_dtypes.finfo(dtype)).max)


def as_float32(scales: Array) -> Array:
    """Return scales as numbers. Bytes are exponents of 2, with 127 added (ue8m0)."""
    return (scales.view(_E8M0) if scales.dtype == np.uint8 else scales).astype(np.float32)


def block_of(part: slice, size: int) -> Array:
    """Return, for each index of a range, its block of `size`, counted from the block of the first."""
    return np.arange(part.start, part.stop, dtype=np.intp) // size - part.start // size


def bits(values: Array) -> Array:
    """Return numbers of two bytes as uint16, without a copy."""
    return values.view(np.uint16)


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """Return numbers rounded to nearest even. What does not fit becomes infinite: `check_values` finds it."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return values.astype(dtype)
