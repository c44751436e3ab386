"""Tensors as all formats see them (name, shape, dtype), and the protocol of readers.

Files are left to the formats, the meaning of tensors to the converter. The protocol of writers is in formats/outputs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from formats import dtypes
from formats.dtypes import Dtype

Array = NDArray[Any]
Shape = tuple[int, ...]

Region = tuple[slice, ...]
"""A region of a tensor: one slice per dimension, each with a start, a stop and step 1."""


def _by_name(table: Sequence[Dtype]) -> dict[str, np.dtype[Any]]:
    return {dtype.name: np.dtype(getattr(ml_dtypes, dtype.torch, dtype.torch)) for dtype in table}


DTYPES = _by_name(dtypes.CONVERTED)
"""numpy's dtypes of those that are converted, by the name that commands and reports use."""

OTHER_DTYPES = _by_name(dtypes.COMPARED)
"""The same of those that are reported and compared, and not converted."""

MOST_DIMENSIONS = 64

_NAMES = {dtype: name for name, dtype in (DTYPES | OTHER_DTYPES).items()}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return `bf16`, `fp32`, …: the inverse of `DTYPES`."""
    return _NAMES[dtype]


def names_of(dtype: np.dtype[Any]) -> Dtype:
    """Return what each format calls a dtype."""
    return dtypes.BY_NAME[_NAMES[dtype]]


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
        """Return the same tensor in another dtype."""
        return TensorSpec(self.name, self.shape, dtype)

    @property
    def stored_shape(self) -> Shape:
        """The shape in its file."""
        return self.shape

    @property
    def stored_dtype(self) -> str:
        """The name of the dtype in its file."""
        return dtype_name(self.dtype)


@dataclass(frozen=True)
class ViewSpec(TensorSpec):
    """A tensor read in another shape or dtype than its file has: as bytes if numpy lacks the dtype."""

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
    """Return whether `value` is a valid size or offset. Larger ones overflow 64-bit offsets of disks and numpy."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def is_valid_shape(sizes: Sequence[Any]) -> bool:
    """Return whether a tensor of these sizes can exist, within the limits of numpy for dimensions and elements."""
    return (
        len(sizes) <= MOST_DIMENSIONS and all(is_size(size) for size in sizes) and prod(max(size, 1) for size in sizes) < 1 << 59
    )


def extent(region: Region) -> Shape:
    """Return the shape of a region."""
    return tuple([part.stop - part.start for part in region])


def intersect(first: Region, second: Region) -> Region | None:
    """Return the intersection of two regions, or None if they are disjoint."""
    shared: list[slice] = []
    for a, b in zip(first, second, strict=True):
        start, stop = max(a.start, b.start), min(a.stop, b.stop)
        if start >= stop:
            return None
        shared.append(slice(start, stop))
    return tuple(shared)


def relative_to(region: Region, origin: Region) -> Region:
    """Return the same region relative to the start of `origin`."""
    return tuple([slice(a.start - b.start, a.stop - b.start) for a, b in zip(region, origin, strict=True)])


class Span(NamedTuple):
    """Bytes of a file from the offset `start`: `known` in advance, or `size` bytes of tensor data."""

    start: int
    known: bytes | None
    size: int = 0

    @property
    def stop(self) -> int:
        return self.start + (self.size if self.known is None else len(self.known))


class Document(NamedTuple):
    """A file of known size whose content is generated when it is written, in blocks."""

    size: int
    blocks: Callable[[], Iterable[bytes]]

    @staticmethod
    def of(data: bytes) -> Document:
        return Document(len(data), lambda: (data,))


class Reader(Protocol):
    """An opened checkpoint. Regions may be read in any order, from several threads."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str, region: Region, out: Array) -> None:
        """Read a region into `out`, which has the region's shape and the tensor's dtype.

        Raises UserError if the file is shorter than its header says.
        """
        ...

    def close(self) -> None:
        """Close open files."""
        ...


def _renamed(spec: TensorSpec, name: str) -> TensorSpec:
    return spec if spec.name == name else replace(spec, name=name)


class JoinedReader:
    """Combine several readers. Of tensors of the same name, that of the last reader counts."""

    def __init__(self, *readers: Reader) -> None:
        self._all = readers
        self.specs = {name: spec for reader in readers for name, spec in reader.specs.items()}

    def read(self, name: str, region: Region, out: Array) -> None:
        next(reader for reader in reversed(self._all) if name in reader.specs).read(name, region, out)

    def close(self) -> None:
        for reader in self._all:
            reader.close()


class RenamedReader:
    """Read some tensors of another reader, under names of their own. Closing it closes nothing."""

    def __init__(self, reader: Reader, names: Mapping[str, str]) -> None:
        """`names`: the tensor of `reader` that each name stands for."""
        self._reader, self._names = reader, names
        self.specs = {name: _renamed(reader.specs[other], name) for name, other in names.items()}

    def read(self, name: str, region: Region, out: Array) -> None:
        self._reader.read(self._names[name], region, out)

    def close(self) -> None:
        pass
