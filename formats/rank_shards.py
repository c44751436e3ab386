"""Put together what ranks hold of each tensor, and read any region of the whole.

What several ranks hold is compared while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np

from formats import rank_names
from formats.chunks import ArchiveLocation, Chunk
from formats.errors import UserError
from formats.folder import Folder
from formats.rank_names import COLUMNS, GATED, Piece
from formats.spec import Array, Region, Shape, TensorSpec, dtype_name, intersect, relative_to
from formats.stored_arrays import StoredArray, read_region

Held = Mapping[str, Mapping[int, Sequence[Piece]]]
"""What ranks hold of each tensor, by its name in the whole model and the tensor-parallel rank."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A region of a tensor, and the arrays that hold it, all the same: from `at` on in each, [columns, rows] if transposed."""

    region: Region
    copies: tuple[StoredArray, ...]
    at: Shape
    transposed: bool

    def stored(self, shared: Region) -> Region:
        """Return where a part of the shard is in its arrays."""
        inside = relative_to(shared, self.region)
        moved = tuple([slice(part.start + at, part.stop + at) for part, at in zip(inside, self.at, strict=True)])
        return moved[::-1] if self.transposed else moved


class Shards(NamedTuple):
    """A tensor as the shards that tile it."""

    dtype: np.dtype[Any]
    shards: tuple[Shard, ...]

    @property
    def shape(self) -> Shape:
        return tuple(max(shard.region[dim].stop for shard in self.shards) for dim in range(len(self.shards[0].region)))

    def elsewhere(self, dtype: np.dtype[Any], locate: Callable[[StoredArray], StoredArray]) -> Shards:
        """Return another tensor of the same shape and division, whose arrays are where `locate` says."""
        return Shards(dtype, tuple(replace(shard, copies=tuple(locate(copy) for copy in shard.copies)) for shard in self.shards))


class ShardedReader:
    """A `Reader` of tensors in shards. Closing it closes nothing."""

    def __init__(self, folder: Folder, tensors: Mapping[str, Shards]) -> None:
        self._folder, self.tensors = folder, tensors
        self.specs = {name: TensorSpec(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    def chunks(self, name: str) -> list[Chunk]:
        """Return where each shard is stored: the first of its arrays, whole."""
        size = self.specs[name].dtype.itemsize
        firsts = [(shard.region, shard.copies[0]) for shard in self.tensors[name].shards]
        return [
            Chunk(region, ArchiveLocation(stored.file, stored.offset, prod(stored.shape) * size)) for region, stored in firsts
        ]

    def read(self, name: str, region: Region, out: Array) -> None:
        """See `Reader.read`. Raises UserError where ranks that should hold the same do not."""
        for shard in self.tensors[name].shards:
            shared = intersect(shard.region, region)
            if shared is None:
                continue
            target = out[(*relative_to(shared, region), ...)]
            self._read(shard.copies[0], shard, shared, target)
            for copy in shard.copies[1:]:
                other = np.empty(target.shape, target.dtype)
                self._read(copy, shard, shared, other)
                if other.tobytes() != target.tobytes():
                    raise _differ(name, shard.copies[0], copy)

    def _read(self, stored: StoredArray, shard: Shard, shared: Region, out: Array) -> None:
        if not shard.transposed:
            return read_region(self._folder, stored, shard.stored(shared), out)
        turned = np.empty(out.shape[::-1], out.dtype)
        read_region(self._folder, stored, shard.stored(shared), turned)
        out[...] = turned.T
        return None

    def close(self) -> None:
        pass


def merge(held: Held, ranks: int) -> dict[str, Shards]:
    """Put together what so many tensor-parallel ranks hold. Raises UserError where they do not fit together."""
    return {name: _merged(name, of_ranks, held, ranks) for name, of_ranks in held.items()}


def _merged(name: str, of_ranks: Mapping[int, Sequence[Piece]], held: Held, ranks: int) -> Shards:
    first = next(iter(of_ranks.values()))[0]
    _check_same(name, of_ranks, ranks)
    axis = rank_names.partition_dim(name, ranks)
    if axis is None:
        return Shards(first.dtype, (_whole([piece for pieces in of_ranks.values() for piece in pieces]),))
    if axis >= len(first.shape):
        raise UserError(f"`{name}` has shape {list(first.shape)}, which ranks cannot divide along axis {axis}")
    blocks = 2 if axis == COLUMNS and GATED in name and _is_gated(name, first, held) else 1
    return Shards(first.dtype, tuple(_divided(of_ranks, axis, blocks)))


def _whole(copies: Sequence[Piece]) -> Shard:
    shape = copies[0].shape
    region = tuple(slice(0, size) for size in shape)
    return Shard(region, tuple(piece.stored for piece in copies), (0,) * len(shape), copies[0].transposed)


def _divided(held: Mapping[int, Sequence[Piece]], axis: int, blocks: int) -> Iterator[Shard]:
    """Yield the shards of a tensor that ranks divide along an axis, each of its equal blocks separately."""
    shape = next(iter(held.values()))[0].shape
    step, ranks = shape[axis] // blocks, len(held)
    for block in range(blocks):
        for tp in range(ranks):
            start = (block * ranks + tp) * step
            region = tuple(slice(start, start + step) if dim == axis else slice(0, size) for dim, size in enumerate(shape))
            at = tuple(block * step if dim == axis else 0 for dim in range(len(shape)))
            yield Shard(region, tuple(piece.stored for piece in held[tp]), at, held[tp][0].transposed)


def _is_gated(name: str, piece: Piece, held: Held) -> bool:
    """Does `linear_fc1` hold gates before what they multiply? It has then twice the rows that `linear_fc2` has columns."""
    after = held.get(rank_names.second(name))
    shape = next(iter(after.values()))[0].shape if after else ()
    return len(shape) == 2 and piece.shape[0] == 2 * shape[1]


def _check_same(name: str, held: Mapping[int, Sequence[Piece]], ranks: int) -> None:
    """Raise UserError unless every tensor-parallel rank holds a tensor, in the same shape and dtype."""
    if missing := [tp for tp in range(ranks) if tp not in held]:
        raise UserError(
            f"tensor-parallel rank {missing[0]} of {ranks} lacks `{name}`", hint="a file is of another run, or damaged"
        )
    first = held[0][0]
    for piece in (piece for copies in held.values() for piece in copies):
        if (piece.shape, piece.dtype, piece.transposed) != (first.shape, first.dtype, first.transposed):
            shapes = " and ".join(
                f"{list(each.shape)} of {dtype_name(each.dtype)} in `{each.stored.file}`" for each in (first, piece)
            )
            raise UserError(f"`{name}` is {shapes}", hint="the files are of two runs, or damaged")


def _differ(name: str, stored: StoredArray, other: StoredArray) -> UserError:
    return UserError(
        f"`{name}` should be the same in `{stored.file}` and `{other.file}`, and differs",
        hint="the files are of two runs, or the ranks of one drifted apart",
    )
