"""A container in which some tensors are made of shards, each of them a run of elements of something flat.

It makes optimizer state that is stored flat look like state in the shapes of the weights' keys, so that `TorchDistReader` names
its tensors. What is where is left to the modules of each kind. A shard costs a row of numbers; a read takes its region alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from formats.arrays import as_bytes
from formats.chunks import ChunkedTensor, check_tiling, stride
from formats.container import Container
from formats.folder import Folder
from formats.spec import Array, Region, Shape, TensorSpec, extent
from formats.stored_arrays import read_flat
from formats.torch_zip import OpenArchive


class Flat(Protocol):
    """Something that is read by the element, in runs."""

    def read(self, start: int, out: Array) -> None:
        """Fill a contiguous array with the elements from `start` on."""
        ...


@dataclass(frozen=True, slots=True)
class FlatTensor:
    """A tensor of a container as one run of elements, of which no read passes the end of a row of its last axis."""

    container: Container
    tensor: ChunkedTensor

    def read(self, start: int, out: Array) -> None:
        *grid, length = self.tensor.shape
        row, at = divmod(start, length)
        index = np.unravel_index(row, grid) if grid else ()
        region = (*[slice(int(number), int(number) + 1) for number in index], slice(at, at + out.size))
        self.container.read(self.tensor, region, out.reshape(extent(region)))


@dataclass(frozen=True, slots=True)
class FlatFile:
    """Elements in a file, from a byte offset on."""

    folder: Folder
    file: str
    offset: int

    def read(self, start: int, out: Array) -> None:
        self.folder.read_into(self.file, self.offset + start * out.dtype.itemsize, as_bytes(out))


class FlatShards:
    """See `Container`: all that `container` has, and beside it `tensors`, whose chunks are shards made by `sharded`."""

    def __init__(
        self, container: Container, tensors: Mapping[str, ChunkedTensor], sources: Mapping[str, Flat], labels: list[str]
    ) -> None:
        """`sources` are what the chunks of `tensors` name as their files, `labels` the names of these in order."""
        self._container, self._tensors, self._sources, self._labels = container, tensors, sources, labels
        self.tensor_names: Iterable[str] = list(dict.fromkeys([*container.tensor_names, *tensors]))

    @property
    def object_names(self) -> Iterable[str]:
        return self._container.object_names

    @property
    def index_files(self) -> Collection[str]:
        return self._container.index_files

    @property
    def files(self) -> Collection[str]:
        return self._container.files

    def shape(self, name: str) -> Shape:
        return self._tensors[name].shape if name in self._tensors else self._container.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._tensors[name].dtype if name in self._tensors else self._container.dtype(name)

    def tensor(self, name: str) -> ChunkedTensor:
        return self._tensors[name] if name in self._tensors else self._container.tensor(name)

    def archive(self, name: str) -> OpenArchive:
        return self._container.archive(name)

    def read(self, tensor: ChunkedTensor, region: Region, out: Array) -> None:
        if tensor.files is not self._labels:
            return self._container.read(tensor, region, out)
        for number, shape, in_chunk, in_region in tensor.overlapping(region):
            run = tensor.location(number)
            read_flat(self._sources[run.file].read, shape, in_chunk, out[(*in_region, ...)], at=run.offset)
        return None

    def close(self) -> None:
        """Close nothing: the container is its opener's."""


def sharded(spec: TensorSpec, bounds: Array, runs: Array, labels: list[str]) -> ChunkedTensor:
    """Return a tensor of shards: offsets and sizes in `bounds` [shards, 2 * dims], in `runs` [shards, 2] the number of its
    source in `labels` and that of its first element there. Raises UserError unless they tile the shape."""
    dims = len(spec.shape)
    numbers = np.full((len(bounds), stride(dims)), -1, np.int64)
    numbers[:, : 2 * dims] = bounds
    numbers[:, 2 * dims : 2 * dims + 2] = runs
    numbers[:, 2 * dims + 2] = bounds[:, dims:].prod(axis=1)
    tensor = ChunkedTensor(spec.shape, spec.dtype, array("q", numbers.tobytes()), labels)
    check_tiling(spec.name, tensor)
    return tensor
