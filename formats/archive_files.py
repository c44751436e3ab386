"""Lay out the archives of a distributed checkpoint in its files, each after the one before.

A checkpoint has hundreds of thousands of chunks, and those of equally sharded layers differ in two numbers. Their offsets are
computed together, as columns of numbers. No file is opened.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from formats.chunks import ChunkedTensor, stride
from formats.spec import Array, Shape
from formats.torch_zip import DATA_ALIGNMENT, Frame


class Shard(NamedTuple):
    """A shard of a tensor: its offset and sizes, [dims] each, and the file that it is stored in."""

    starts: Shape
    sizes: Shape
    file: str


class NewPart(NamedTuple):
    """A tensor to write, or one row of it where layers are stacked (or a row of a row, of experts), and the shards that tile it.
    Equally sharded parts share one `shards` object."""

    key: str
    rows: tuple[int, ...]
    shards: Sequence[Shard]


class ArchiveFiles:
    """Files that archives are appended to. Files and frames are numbered in order of first use."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._frames: dict[Frame, int] = {}
        self._ends = np.zeros(0, np.int64)
        self._placed: list[tuple[Array, Array, Array]] = []

    @property
    def names(self) -> list[str]:
        return list(self._files)

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self._files, self._ends.tolist(), strict=True))

    def file(self, name: str) -> int:
        """Return the number of a file."""
        return self._files.setdefault(name, len(self._files))

    def frame(self, frame: Frame) -> int:
        """Return the number of a frame."""
        return self._frames.setdefault(frame, len(self._frames))

    def append(self, files: Array, frames: Array, *, alignment: int = 1) -> Array:
        """Append archives to files, both given by number, in this order.

        Returns the location of each, [count, 3]: file number, byte offset, length."""
        lengths = np.array([frame.length for frame in self._frames], np.int64)[frames]
        self._ends = np.append(self._ends, np.zeros(len(self._files) - len(self._ends), np.int64))
        order = np.argsort(files, kind="stable")
        sorted_files, room = files[order], _aligned(lengths[order], alignment)
        before = np.cumsum(room) - room
        before -= before[np.searchsorted(sorted_files, sorted_files)]  # those of the files before
        starts = np.empty_like(lengths)
        starts[order] = _aligned(self._ends, alignment)[sorted_files] + before
        np.maximum.at(self._ends, files, starts + lengths)
        self._placed.append((sorted_files.astype(np.int32), starts[order], frames[order].astype(np.int32)))
        return np.stack([files, starts, lengths], axis=1)

    def content(self, name: str) -> Iterator[tuple[int, Frame]]:
        """Yield the archives of a file in order: byte offset and frame."""
        number, known = self._files[name], list(self._frames)
        for files, starts, frames in self._placed:
            first, last = np.searchsorted(files, [number, number + 1])
            for start, frame in zip(starts[first:last].tolist(), frames[first:last].tolist(), strict=True):
                yield start, known[frame]


def _aligned(sizes: Array, alignment: int) -> Array:
    return -(-sizes // alignment) * alignment


def append_parts(
    files: ArchiveFiles,
    tensors: Mapping[str, tuple[Shape, np.dtype[Any]]],
    parts: Iterable[NewPart],
    frame: Callable[[np.dtype[Any], Shape], Frame],
) -> dict[str, ChunkedTensor]:
    """Append the chunks of `parts` to files, in this order, and return the tensors by key.

    `tensors` gives each key's shape and dtype; `frame` returns the archive bytes around a chunk of a dtype and shape."""
    groups, count = _alike(parts)
    numbers = np.empty((2, count), np.int64)
    for group in groups:
        dtype = tensors[group.key][1]
        numbers[0, group.numbers] = [files.file(shard.file) for shard in group.shards]
        numbers[1, group.numbers] = [files.frame(frame(dtype, tuple(sizes))) for sizes in group.sizes.tolist()]
    locations = files.append(numbers[0], numbers[1], alignment=DATA_ALIGNMENT)
    of_key: dict[str, list[_Group]] = {key: [] for key in tensors}
    for group in groups:
        of_key[group.key].append(group)
    names = files.names
    return {
        key: ChunkedTensor(shape, dtype, _table(of_key[key], len(shape), locations), names)
        for key, (shape, dtype) in tensors.items()
    }


def _table(groups: Sequence[_Group], dims: int, locations: Array) -> array[int]:
    """Return the numbers of `ChunkedTensor` for the chunks of one key, in their order among all chunks.

    They are filled in place: a large model has tens of MiB of them.
    """
    chunks = [group.numbers.reshape(-1) for group in groups]
    order = np.argsort(np.concatenate(chunks)) if chunks else np.zeros(0, np.int64)
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    numbers = array("q", [0]) * (len(order) * stride(dims))
    table, done = np.frombuffer(numbers, np.int64).reshape(-1, stride(dims)), 0
    for group, some in zip(groups, chunks, strict=True):
        table[position[done : done + len(some)]] = group.table(locations).reshape(len(some), -1)
        done += len(some)
    return numbers


@dataclass(slots=True)
class _Group:
    """Parts of one key with the same shards. Each has the number of its first chunk among all chunks, and its `depth` rows."""

    key: str
    shards: Sequence[Shard]
    depth: int
    firsts: array[int] = field(default_factory=lambda: array("q"))
    rows: array[int] = field(default_factory=lambda: array("q"))

    @property
    def numbers(self) -> Array:
        """The numbers of the chunks, [parts, shards]."""
        return np.array(self.firsts, np.int64)[:, np.newaxis] + np.arange(len(self.shards))

    @property
    def sizes(self) -> Array:
        """The sizes of a part's chunks, [shards, dims]."""
        return self._with_rows([shard.sizes for shard in self.shards], 1)

    def _with_rows(self, numbers: Sequence[Shape], row: int) -> Array:
        return np.array([(*(row,) * self.depth, *some) for some in numbers], np.int64).reshape(len(numbers), -1)

    def table(self, locations: Array) -> Array:
        """Return the rows of `ChunkedTensor` for the chunks, [parts, shards, stride]."""
        sizes = self.sizes
        dims = sizes.shape[1]
        table = np.full((len(self.firsts), len(self.shards), stride(dims)), -1, np.int64)
        table[:, :, :dims] = self._with_rows([shard.starts for shard in self.shards], 0)
        table[:, :, : self.depth] = np.array(self.rows, np.int64).reshape(len(self.firsts), 1, self.depth)
        table[:, :, dims : 2 * dims] = sizes
        table[:, :, 2 * dims : -1] = locations[self.numbers]
        return table


def _alike(parts: Iterable[NewPart]) -> tuple[list[_Group], int]:
    """Group parts by key and shards; return the groups and the number of chunks."""
    groups: dict[tuple[str, int], _Group] = {}
    count = 0
    for key, rows, shards in parts:
        group = groups.get((key, id(shards)))
        if group is None:
            group = groups[key, id(shards)] = _Group(key, shards, len(rows))
        group.firsts.append(count)
        group.rows.extend(rows)
        count += len(shards)
    return list(groups.values()), count
