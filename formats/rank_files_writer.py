"""Write Megatron-LM's files of model-parallel ranks, `--ckpt-format torch`; read by `rank_files.py`.

Each file is one archive of `torch.save`, whose size and layout follow from names, dtypes and shapes alone. Which rank holds
what, and under which name, the caller says.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from math import prod
from typing import Any, NamedTuple

import numpy as np

from formats.iterations import RELEASE, TRACKER
from formats.outputs import Outputs
from formats.spec import Array, Document, Region, Shape, Span, TensorSpec, dtype_name, intersect, relative_to
from formats.stored_arrays import StoredArray, file_offset, write_region
from formats.torch_zip import archive_spans, tensor_record


class Holder(NamedTuple):
    """A file that holds an array: the number of the model chunk there, and the array's name in its state dict."""

    file: str
    chunk: int
    name: str


class RankArray(NamedTuple):
    """An array that one or several ranks hold of a weight: its shape, and the regions of the weight that it is made of, each with
    where that starts in the array."""

    shape: Shape
    shards: tuple[tuple[Region, Shape], ...]
    holders: tuple[Holder, ...]


class RankState(NamedTuple):
    """A file without its weights: the names of `None` in the state dict of each model chunk."""

    file: str
    empty: Sequence[Sequence[str]]


class _Entry(NamedTuple):
    chunk: int
    name: str
    dtype: np.dtype[Any]
    shape: Shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class RankFilesWriter:
    """The layout of one iteration, `release`, which Megatron-LM takes for weights without a run. Data lies in each file in the
    order of `weights`."""

    def __init__(
        self,
        weights: Iterable[tuple[TensorSpec, tuple[RankArray, ...]]],
        states: Iterable[RankState],
        common: Mapping[str, Any],
    ) -> None:
        """`common` is what every file has beside weights: `args`, `iteration`, …"""
        self._common, self._states = common, {f"{RELEASE}/{state.file}": state for state in states}
        self._entries: dict[str, list[_Entry]] = {file: [] for file in self._states}
        self.specs: dict[str, TensorSpec] = {}
        self._arrays: dict[str, tuple[RankArray, ...]] = {}
        self._numbers: dict[str, array[int]] = {}
        """The numbers of a weight's entries in their files: of its arrays, of each array's holders."""

        for spec, arrays in weights:
            self.specs[spec.name], self._arrays[spec.name] = spec, arrays
            self._numbers[spec.name] = array("q", self._added(spec, arrays))
        self._starts, self._sizes = dict[str, list[int]](), dict[str, int]()
        for file in self._states:
            spans = list(self.spans(file))
            self._starts[file] = [span.start for span in spans if span.known is None]
            self._sizes[file] = spans[-1].stop

    def _added(self, spec: TensorSpec, arrays: Iterable[RankArray]) -> Iterator[int]:
        for each in arrays:
            for holder in each.holders:
                entries = self._entries[f"{RELEASE}/{holder.file}"]
                entries.append(_Entry(holder.chunk, holder.name, spec.dtype, each.shape))
                yield len(entries) - 1

    @property
    def files(self) -> dict[str, int]:
        return self._sizes

    @property
    def documents(self) -> dict[str, Document]:
        """None: each file is its own index."""
        return {}

    @property
    def markers(self) -> dict[str, bytes]:
        return {TRACKER: RELEASE.encode()}

    def spans(self, file: str) -> Iterator[Span]:
        return archive_spans(self._value(file), [entry.nbytes for entry in self._entries[file]])

    def _value(self, file: str) -> dict[str, Any]:
        """Return what a file holds; tensors are records of their location."""
        chunks: list[dict[str, Any]] = [dict.fromkeys(names) for names in self._states[file].empty]
        for number, entry in enumerate(self._entries[file]):
            chunks[entry.chunk][entry.name] = tensor_record(dtype_name(entry.dtype), entry.shape, key=str(number))
        if len(chunks) == 1:
            return {**self._common, "model": chunks[0]}
        return {**self._common, **{f"model{number}": chunk for number, chunk in enumerate(chunks)}}

    def _stored(self, name: str, region: Region) -> Iterator[tuple[StoredArray, Region, Region]]:
        """Yield the arrays that hold part of a region, that part, and where it is in the array."""
        numbers, at = self._numbers[name], count()
        for each in self._arrays[name]:
            held = [(file := f"{RELEASE}/{holder.file}", self._starts[file][numbers[next(at)]]) for holder in each.holders]
            for shard, start in each.shards:
                shared = intersect(shard, region)
                if shared is None:
                    continue
                inside = tuple(
                    slice(part.start + first, part.stop + first)
                    for part, first in zip(relative_to(shared, shard), start, strict=True)
                )
                for file, offset in held:
                    yield StoredArray(file, offset, each.shape), shared, inside

    def touched(self, name: str, region: Region | None = None) -> set[str]:
        return {stored.file for stored, *_ in self._stored(name, region or self.specs[name].full_region)}

    def file_offset(self, name: str, region: Region) -> int:
        corner = tuple(slice(part.start, part.start + 1) for part in region)
        stored, _, inside = next(self._stored(name, corner))
        return file_offset(stored, inside, self.specs[name].dtype.itemsize)

    def write(self, outputs: Outputs, name: str, region: Region, data: Array) -> None:
        for stored, shared, inside in self._stored(name, region):
            write_region(outputs, stored, inside, data[(*relative_to(shared, region), ...)])
