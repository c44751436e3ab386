"""What a tensor is to every format: a name, a shape, a dtype; and what a reader promises.

What a writer promises is in formats/outputs.py. Imports no model code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, ...]

Region = tuple[slice, ...]
"""A box in a tensor: one slice per dimension, each with a start, a stop and step 1."""

DTYPES: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "fp64": np.dtype(np.float64),
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
"""Every dtype that is converted, by the name that commands and reports use."""

OTHER_DTYPES: dict[str, np.dtype[Any]] = {
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "complex64": np.dtype(np.complex64),
    "fp8_e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "fp8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "fp8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
"""Dtypes that are reported and compared, and not converted."""

MOST_DIMENSIONS = 64

_NAMES = {dtype: name for name, dtype in (DTYPES | OTHER_DTYPES).items()}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """`bf16`, `fp32`, …: the inverse of `DTYPES`."""
    return _NAMES[dtype]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor, without its data."""

    name: str
    shape: Shape
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def full_region(self) -> Region:
        return tuple(slice(0, size) for size in self.shape)

    def cast(self, dtype: np.dtype[Any]) -> TensorSpec:
        """The same tensor in another dtype."""
        return TensorSpec(self.name, self.shape, dtype)

    @property
    def stored_shape(self) -> Shape:
        """The shape that its file says."""
        return self.shape

    @property
    def stored_dtype(self) -> str:
        """The name of the dtype that its file says."""
        return dtype_name(self.dtype)


@dataclass(frozen=True)
class ViewSpec(TensorSpec):
    """A tensor that is read in another shape or dtype than its file says: as bytes where numpy has no such dtype, or as one
    row where it has no dimensions."""

    file_shape: Shape
    file_dtype: str

    def cast(self, dtype: np.dtype[Any]) -> TensorSpec:
        return ViewSpec(self.name, self.shape, dtype, self.file_shape, dtype_name(dtype))

    @property
    def stored_shape(self) -> Shape:
        return self.file_shape

    @property
    def stored_dtype(self) -> str:
        return self.file_dtype


def is_size(value: Any) -> bool:
    """Could it be a size or an offset? Larger ones overflow what disks and numpy count with."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def is_valid_shape(sizes: Sequence[Any]) -> bool:
    """Could these be a tensor's sizes? numpy holds no more dimensions, and no more elements even where there are none."""
    return (
        len(sizes) <= MOST_DIMENSIONS and all(is_size(size) for size in sizes) and prod(max(size, 1) for size in sizes) < 1 << 59
    )


def extent(region: Region) -> Shape:
    """The shape of a region."""
    return tuple([part.stop - part.start for part in region])


def intersect(one: Region, other: Region) -> Region | None:
    """The box two regions share, or None."""
    shared: list[slice] = []
    for a, b in zip(one, other, strict=True):
        start, stop = max(a.start, b.start), min(a.stop, b.stop)
        if start >= stop:
            return None
        shared.append(slice(start, stop))
    return tuple(shared)


def relative_to(region: Region, origin: Region) -> Region:
    """The same box, counted from the first corner of `origin`."""
    return tuple([slice(a.start - b.start, a.stop - b.start) for a, b in zip(region, origin, strict=True)])


class Span(NamedTuple):
    """Bytes of a file from `start` on: known before any data is there, or `size` bytes of data that will arrive."""

    start: int
    known: bytes | None
    size: int = 0

    @property
    def stop(self) -> int:
        return self.start + (self.size if self.known is None else len(self.known))


@dataclass(frozen=True, slots=True)
class Document:
    """A file whose size is known and whose bytes are made when they are written, in blocks."""

    size: int
    blocks: Callable[[], Iterable[bytes]]

    @staticmethod
    def of(data: bytes) -> Document:
        return Document(len(data), lambda: (data,))


class Reader(Protocol):
    """An opened checkpoint. Regions may be read in any order and from several threads."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str, region: Region, out: Array) -> None:
        """Fill `out`, which has the region's shape and the tensor's dtype.

        Raises UserError where the file holds less than its header says.
        """
        ...

    def close(self) -> None:
        """Let go of open files."""
        ...


class JoinedReader:
    """Several readers as one. Their tensors have different names."""

    def __init__(self, *readers: Reader) -> None:
        self._all = readers
        self._readers = {name: reader for reader in readers for name in reader.specs}
        self.specs = {name: spec for reader in readers for name, spec in reader.specs.items()}

    def read(self, name: str, region: Region, out: Array) -> None:
        self._readers[name].read(name, region, out)

    def close(self) -> None:
        for reader in self._all:
            reader.close()
