"""Put together what ranks hold of each tensor, and read any region of the whole.

What several ranks hold is compared while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

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
class Box:
    """A region of a tensor, and the arrays that hold it, all the same: from `at` on in each, [columns, rows] if transposed."""

    region: Region
    copies: tuple[StoredArray, ...]
    at: Shape
    transposed: bool

    def stored(self, shared: Region) -> Region:
        """Return where a part of the box is in its arrays."""
        inside = relative_to(shared, self.region)
        moved = tuple([slice(part.start + at, part.stop + at) for part, at in zip(inside, self.at, strict=True)])
        return moved[::-1] if self.transposed else moved


@dataclass(frozen=True, slots=True)
class Boxes:
    """A tensor as the boxes that tile it."""

    dtype: np.dtype[Any]
    boxes: tuple[Box, ...]

    @property
    def shape(self) -> Shape:
        return tuple(max(box.region[dim].stop for box in self.boxes) for dim in range(len(self.boxes[0].region)))

    def elsewhere(self, dtype: np.dtype[Any], locate: Callable[[StoredArray], StoredArray]) -> Boxes:
        """Return another tensor of the same shape and division, whose arrays are where `locate` says."""
        return Boxes(dtype, tuple(replace(box, copies=tuple(locate(copy) for copy in box.copies)) for box in self.boxes))


class BoxesReader:
    """A `Reader` of tensors in boxes. Closing it closes nothing."""

    def __init__(self, folder: Folder, tensors: Mapping[str, Boxes]) -> None:
        self._folder, self.tensors = folder, tensors
        self.specs = {name: TensorSpec(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    def chunks(self, name: str) -> list[Chunk]:
        """Return where each box is stored: the first of its arrays, whole."""
        size = self.specs[name].dtype.itemsize
        firsts = [(box.region, box.copies[0]) for box in self.tensors[name].boxes]
        return [
            Chunk(region, ArchiveLocation(stored.file, stored.offset, prod(stored.shape) * size)) for region, stored in firsts
        ]

    def read(self, name: str, region: Region, out: Array) -> None:
        """See `Reader.read`. Raises UserError where ranks that should hold the same do not."""
        for box in self.tensors[name].boxes:
            shared = intersect(box.region, region)
            if shared is None:
                continue
            target = out[(*relative_to(shared, region), ...)]
            self._read(box.copies[0], box, shared, target)
            for copy in box.copies[1:]:
                other = np.empty(target.shape, target.dtype)
                self._read(copy, box, shared, other)
                if other.tobytes() != target.tobytes():
                    raise _differ(name, box.copies[0], copy)

    def _read(self, stored: StoredArray, box: Box, shared: Region, out: Array) -> None:
        if not box.transposed:
            return read_region(self._folder, stored, box.stored(shared), out)
        turned = np.empty(out.shape[::-1], out.dtype)
        read_region(self._folder, stored, box.stored(shared), turned)
        out[...] = turned.T
        return None

    def close(self) -> None:
        pass


def merge(held: Held, ranks: int) -> dict[str, Boxes]:
    """Put together what so many tensor-parallel ranks hold. Raises UserError where they do not fit together."""
    return {name: _merged(name, of_ranks, held, ranks) for name, of_ranks in held.items()}


def _merged(name: str, of_ranks: Mapping[int, Sequence[Piece]], held: Held, ranks: int) -> Boxes:
    first = next(iter(of_ranks.values()))[0]
    _check_same(name, of_ranks, ranks)
    axis = rank_names.partition_dim(name, ranks)
    if axis is None:
        return Boxes(first.dtype, (_whole([piece for pieces in of_ranks.values() for piece in pieces]),))
    if axis >= len(first.shape):
        raise UserError(f"`{name}` has shape {list(first.shape)}, which ranks cannot divide along axis {axis}")
    blocks = 2 if axis == COLUMNS and GATED in name and _is_gated(name, first, held) else 1
    return Boxes(first.dtype, tuple(_divided(of_ranks, axis, blocks)))


def _whole(copies: Sequence[Piece]) -> Box:
    shape = copies[0].shape
    region = tuple(slice(0, size) for size in shape)
    return Box(region, tuple(piece.stored for piece in copies), (0,) * len(shape), copies[0].transposed)


def _divided(held: Mapping[int, Sequence[Piece]], axis: int, blocks: int) -> Iterator[Box]:
    """Yield the boxes of a tensor that ranks divide along an axis, each of its equal blocks separately."""
    shape = next(iter(held.values()))[0].shape
    step, ranks = shape[axis] // blocks, len(held)
    for block in range(blocks):
        for tp in range(ranks):
            start = (block * ranks + tp) * step
            region = tuple(slice(start, start + step) if dim == axis else slice(0, size) for dim, size in enumerate(shape))
            at = tuple(block * step if dim == axis else 0 for dim in range(len(shape)))
            yield Box(region, tuple(piece.stored for piece in held[tp]), at, held[tp][0].transposed)


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
