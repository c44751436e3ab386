"""Read Megatron-LM's checkpoints with a file for each model-parallel rank: `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`.

A file holds the state dict of its rank: its shards, under names that count layers and experts of the rank alone. Here they are
named and put together as in the whole model. What several ranks hold is compared while it is read. Layout: Megatron-LM 0.19's
`megatron/training/checkpointing.py` (`get_checkpoint_name`), and megatron-core's layers for how ranks divide a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from formats import rank_names
from formats.chunks import ArchiveLocation, Chunk
from formats.errors import UserError
from formats.folder import FileRef, Folder
from formats.iterations import find_iteration
from formats.rank_folders import Rank, RankFile, args_of, open_ranks
from formats.rank_names import COLUMNS, GATED, Piece
from formats.spec import Array, Region, Shape, TensorSpec, dtype_name, intersect, relative_to
from formats.stored_arrays import StoredArray, read_region

_LARGE = ("model", "optimizer", "rng_state")
"""What is in a file beside the common state."""


@dataclass(frozen=True, slots=True)
class Box:
    """A region of a weight, and the arrays that hold it, all the same: from `at` on in each, [columns, rows] if transposed."""

    region: Region
    copies: tuple[StoredArray, ...]
    at: Shape
    transposed: bool

    def stored(self, shared: Region) -> Region:
        """Return where a part of the box is in its arrays."""
        inside = relative_to(shared, self.region)
        moved = tuple([slice(part.start + at, part.stop + at) for part, at in zip(inside, self.at, strict=True)])
        return moved[::-1] if self.transposed else moved


class RankFilesReader:
    """An opened iteration; see `MegatronReader`. Opening reads the pickle of every rank."""

    settings: FileRef | None = None

    def __init__(self, folder: Folder) -> None:
        self.folder = find_iteration(folder)
        self._files = open_ranks(self.folder)
        self._first = next(iter(self._files.values()))
        self.others = ["optimizer"] if self.has_optimizer else []
        self._boxes: dict[str, tuple[Box, ...]] = {}
        self.specs: dict[str, TensorSpec] = {}
        pieces = self._pieces()
        for name, held in pieces.items():
            self._add(name, held, pieces)

    @property
    def files(self) -> list[str]:
        return [rank_file.name for rank_file in self._files.values()]

    @property
    def index_files(self) -> list[str]:
        """None: each file is its own index."""
        return []

    @property
    def has_optimizer(self) -> bool:
        beside = "".join(self._first.name.rpartition("/")[:2]) + "distrib_optim.pt"
        return "optimizer" in self._first.state or self.folder.has(beside)

    def args(self) -> Mapping[str, Any]:
        """See `MegatronReader.args`."""
        return args_of(self._first)

    def common_state(self) -> Mapping[str, Any]:
        """See `MegatronReader.common_state`."""
        return {name: value for name, value in self._first.state.items() if not name.startswith(_LARGE)}

    def check(self, names: Iterable[str] | None = None) -> None:
        """See `MegatronReader.check`: opening has checked everything."""

    def chunks(self, name: str) -> list[Chunk]:
        """See `MegatronReader.chunks`."""
        size = self.specs[name].dtype.itemsize
        return [
            Chunk(box.region, ArchiveLocation(stored.file, stored.offset, int(np.prod(stored.shape)) * size))
            for box in self._boxes[name]
            for stored in box.copies[:1]
        ]

    def optimizer_state(self, prefix: str) -> RankFilesReader:  # noqa: ARG002 - of the protocol
        """Return a reader of no tensors: optimizer state in these files has no names."""
        empty = RankFilesReader.__new__(RankFilesReader)
        empty.__dict__ = {**self.__dict__, "specs": {}, "_boxes": {}}
        return empty

    def read(self, name: str, region: Region, out: Array) -> None:
        """See `Reader.read`. Raises UserError where ranks that should hold the same do not."""
        for box in self._boxes[name]:
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
            return read_region(self.folder, stored, box.stored(shared), out)
        turned = np.empty(out.shape[::-1], out.dtype)
        read_region(self.folder, stored, box.stored(shared), turned)
        out[...] = turned.T
        return None

    def close(self) -> None:
        self.folder.close()

    def _pieces(self) -> dict[str, dict[int, list[Piece]]]:
        """Return what the ranks hold of each weight, by its name in the whole model and the tensor-parallel rank."""
        first_layers = _first_layers(self._files, self.args())
        held: dict[str, dict[int, list[Piece]]] = {}
        for rank, rank_file in self._files.items():
            for chunk, state in enumerate(rank_file.models):
                for name, piece in rank_names.pieces(state, rank_file, first=first_layers[chunk, rank.pp], ep=rank.ep):
                    held.setdefault(name, {}).setdefault(rank.tp, []).append(piece)
        return self._untied(held)

    def _untied(self, held: dict[str, dict[int, list[Piece]]]) -> dict[str, dict[int, list[Piece]]]:
        """Count the last stage's copy of a tied embedding as one more copy of it."""
        tied = self.args().get("untie_embeddings_and_output_weights") is False
        if tied and rank_names.OUTPUT in held and rank_names.EMBEDDING in held:
            for tp, copies in held.pop(rank_names.OUTPUT).items():
                held[rank_names.EMBEDDING].setdefault(tp, []).extend(copies)
        return held

    def _add(self, name: str, held: Mapping[int, Sequence[Piece]], pieces: Mapping[str, Mapping[int, Sequence[Piece]]]) -> None:
        ranks = 1 + max(rank.tp for rank in self._files)
        first = next(iter(held.values()))[0]
        _check_same(name, held, ranks)
        axis = rank_names.partition_dim(name, ranks)
        blocks = 2 if axis == COLUMNS and GATED in name and _is_gated(name, first, pieces) else 1
        copies = [piece for of_rank in held.values() for piece in of_rank]
        boxes = (_whole(copies),) if axis is None else tuple(_boxes(held, axis, blocks))
        shape = tuple(max(box.region[dim].stop for box in boxes) for dim in range(len(first.shape)))
        self._boxes[name], self.specs[name] = boxes, TensorSpec(name, shape, first.dtype)


def _whole(copies: Sequence[Piece]) -> Box:
    shape = copies[0].shape
    region = tuple(slice(0, size) for size in shape)
    return Box(region, tuple(one.stored for one in copies), (0,) * len(shape), copies[0].transposed)


def _boxes(held: Mapping[int, Sequence[Piece]], axis: int, blocks: int) -> Iterator[Box]:
    """Yield the boxes of a weight that ranks divide along an axis, each of its equal blocks separately."""
    shape = next(iter(held.values()))[0].shape
    step, ranks = shape[axis] // blocks, len(held)
    for block in range(blocks):
        for tp in range(ranks):
            start = (block * ranks + tp) * step
            region = tuple(slice(start, start + step) if dim == axis else slice(0, size) for dim, size in enumerate(shape))
            at = tuple(block * step if dim == axis else 0 for dim in range(len(shape)))
            yield Box(region, tuple(one.stored for one in held[tp]), at, held[tp][0].transposed)


def _is_gated(name: str, piece: Piece, pieces: Mapping[str, Mapping[int, Sequence[Piece]]]) -> bool:
    """Does `linear_fc1` hold gates before what they multiply? It has then twice the rows that `linear_fc2` has columns."""
    after = pieces.get(rank_names.second(name))
    return after is not None and piece.shape[0] == 2 * next(iter(after.values()))[0].shape[1]


def _check_same(name: str, held: Mapping[int, Sequence[Piece]], ranks: int) -> None:
    """Raise UserError unless every tensor-parallel rank holds a weight, in the same shape and dtype."""
    if missing := [tp for tp in range(ranks) if tp not in held]:
        raise UserError(
            f"tensor-parallel rank {missing[0]} of {ranks} lacks `{name}`", hint="a file is of another run, or damaged"
        )
    first = held[0][0]
    for piece in (piece for copies in held.values() for piece in copies):
        if (piece.shape, piece.dtype) != (first.shape, first.dtype):
            shapes = " and ".join(
                f"{list(one.shape)} of {dtype_name(one.dtype)} in `{one.stored.file}`" for one in (first, piece)
            )
            raise UserError(f"`{name}` is {shapes}", hint="the files are of two runs, or damaged")


def _first_layers(files: Mapping[Rank, RankFile], args: Mapping[str, Any]) -> dict[tuple[int, int], int]:
    """Return the number of the first layer of each model chunk, by chunk and pipeline rank; stages may be uneven."""
    counts = {
        (chunk, rank.pp): rank_names.count_layers(state, rank_file.name)
        for rank, rank_file in files.items()
        for chunk, state in enumerate(rank_file.models)
    }
    firsts, layers = dict[tuple[int, int], int](), 0
    for place in sorted(counts):
        firsts[place] = layers
        layers += counts[place]
    expected = args.get("num_layers")
    if expected is not None and expected != layers:
        raise UserError(f"the files hold {layers} layers, and their `args` say {expected}", hint="the files are of two runs")
    return firsts


def _differ(name: str, one: StoredArray, other: StoredArray) -> UserError:
    return UserError(
        f"`{name}` should be the same in `{one.file}` and `{other.file}`, and differs",
        hint="the files are of two runs, or the ranks of one drifted apart",
    )
