"""Write the `fsdp_dtensor` format, in which Megatron-FSDP stores weights: PyTorch's container with a key for each weight.

Keys are those of the model's state dict below the wrappers that hold it. A gated projection is two keys, the gate and what it
multiplies, so that any number of ranks can divide each. Layout: megatron-core 0.19's `transformer/fsdp_dtensor_checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from formats.archive_files import NewPart, Shard
from formats.dcp import ContainerWriter, NewObject
from formats.dcp_index import METADATA
from formats.iterations import TRACKER, TRAIN_STATE, TRAIN_STATE_TRACKER, iteration_folder
from formats.object_names import ObjectName
from formats.outputs import Outputs
from formats.spec import Array, Document, Region, Shape, Span, TensorSpec, extent
from formats.torch_dist import GATE, ROOTS, UP
from formats.torch_dist_writer import rank_file, train_state
from formats.torch_zip import object_archive


class FsdpTensor(NamedTuple):
    """A weight, its name in the model's state dict, and how ranks hold it: shards, none of which has rows of both halves of a
    `gated` projection."""

    spec: TensorSpec
    name: str
    gated: bool
    chunks: tuple[tuple[Region, int], ...]


class _Stored(NamedTuple):
    """A key of a weight, and the rows of the weight that it holds."""

    key: str
    rows: slice

    def part(self, region: Region) -> tuple[Region, slice] | None:
        """Return the part of a region under this key, and its rows in the region; None where there are none."""
        start, stop = max(region[0].start, self.rows.start), min(region[0].stop, self.rows.stop)
        if start >= stop:
            return None
        shared = slice(start - self.rows.start, stop - self.rows.start)
        return (shared, *region[1:]), slice(start - region[0].start, stop - region[0].start)


class FsdpWriter:
    """The layout of one iteration, under a root with its trackers."""

    def __init__(self, tensors: Iterable[FsdpTensor], common: Mapping[str, Any], *, iteration: int = 0) -> None:
        """`common` are objects beside the weights, by name: `args`, `iteration`, `checkpoint_version`."""
        self._iteration, self._folder = iteration, iteration_folder(iteration)
        self.specs: dict[str, TensorSpec] = {}
        self._stored: dict[str, tuple[_Stored, ...]] = {}
        keys, parts = dict[str, tuple[Shape, np.dtype[Any]]](), list[NewPart]()
        for tensor in tensors:
            spec = tensor.spec
            self.specs[spec.name], self._stored[spec.name] = spec, _stored(tensor)
            for stored in self._stored[spec.name]:
                keys[stored.key] = ((stored.rows.stop - stored.rows.start, *spec.shape[1:]), spec.dtype)
                parts.append(NewPart(stored.key, (), list(_shards(tensor, stored))))
        objects = [NewObject(ObjectName(name, sizes=None), rank_file(0), object_archive(value)) for name, value in common.items()]
        self._container = ContainerWriter(self._folder, keys, parts, objects)

    @property
    def files(self) -> dict[str, int]:
        return self._container.files

    @property
    def documents(self) -> dict[str, Document]:
        inside = {TRAIN_STATE: Document.of(train_state(self._iteration)), METADATA: self._container.metadata}
        return {f"{self._folder}/{name}": data for name, data in inside.items()}

    @property
    def markers(self) -> dict[str, bytes]:
        """Both trackers: Megatron-LM reads the text, Megatron-Bridge the other."""
        return {TRAIN_STATE_TRACKER: train_state(self._iteration), TRACKER: str(self._iteration).encode()}

    def spans(self, file: str) -> Iterator[Span]:
        return self._container.spans(file)

    def touched(self, name: str, region: Region | None = None) -> set[str]:
        parts = self._parts(name, region or self.specs[name].full_region)
        return {file for key, part, _ in parts for file in self._container.touched(key, part)}

    def file_offset(self, name: str, region: Region) -> int:
        key, part, _ = next(self._parts(name, region))
        return self._container.file_offset(key, part)

    def write(self, outputs: Outputs, name: str, region: Region, data: Array) -> None:
        for key, part, rows in self._parts(name, region):
            self._container.write(outputs, key, part, data[rows])

    def _parts(self, name: str, region: Region) -> Iterator[tuple[str, Region, slice]]:
        """Yield the keys that hold part of a region, that part of the key, and its rows in the region."""
        for stored in self._stored[name]:
            if overlap := stored.part(region):
                yield stored.key, *overlap


def _stored(tensor: FsdpTensor) -> tuple[_Stored, ...]:
    key, rows = f"{ROOTS[0]}{tensor.name}", tensor.spec.shape[0]
    if not tensor.gated:
        return (_Stored(key, slice(0, rows)),)
    half = rows // 2
    return _Stored(f"{key}{GATE}", slice(0, half)), _Stored(f"{key}{UP}", slice(half, rows))


def _shards(tensor: FsdpTensor, stored: _Stored) -> Iterator[Shard]:
    for region, rank in tensor.chunks:
        if overlap := stored.part(region):
            part, _ = overlap
            yield Shard(tuple(each.start for each in part), extent(part), rank_file(rank))
