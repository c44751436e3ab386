"""Read Megatron-LM's checkpoints with a file for each model-parallel rank: `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`.

A file holds the state dict of its rank: its shards, under names that count layers and experts of the rank alone. Here they are
named and put together as in the whole model. What several ranks hold is compared while it is read. Layout: Megatron-LM 0.19's
`megatron/training/checkpointing.py` (`get_checkpoint_name`), and megatron-core's layers for how ranks divide a weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from formats import rank_names
from formats.chunks import Chunk
from formats.errors import UserError, format_untrusted
from formats.folder import FileRef, Folder
from formats.iterations import find_iteration
from formats.rank_folders import OPTIMIZER_FILE, Rank, RankFile, args_of, open_ranks
from formats.rank_names import EMBEDDING, OUTPUT, Piece
from formats.rank_shards import ShardedReader, merge
from formats.spec import Array, Region

_LARGE = ("model", "optimizer", "rng_state")
"""What is in a file beside the common state."""


class RankFilesReader:
    """An opened iteration; see `MegatronReader`. Opening reads the pickle of every rank."""

    settings: FileRef | None = None

    def __init__(self, folder: Folder) -> None:
        self.folder = find_iteration(folder)
        self.ranks = open_ranks(self.folder)
        self._first = next(iter(self.ranks.values()))
        self.others = ["optimizer"] if self.has_optimizer else []
        self.weights = ShardedReader(self.folder, merge(self._pieces(), 1 + max(rank.tp for rank in self.ranks)))
        self.specs = self.weights.specs

    @property
    def files(self) -> list[str]:
        beside = [f"{rank_file.folder}{OPTIMIZER_FILE}" for rank_file in self.ranks.values()]
        return [*(rank_file.name for rank_file in self.ranks.values()), *(name for name in beside if self.folder.has(name))]

    @property
    def index_files(self) -> list[str]:
        """None: each file is its own index."""
        return []

    @property
    def has_optimizer(self) -> bool:
        return bool(self._first.state.get("optimizer")) or self.folder.has(f"{self._first.folder}{OPTIMIZER_FILE}")

    @property
    def contents(self) -> Collection[str]:
        """See `MegatronReader.contents`."""
        return self._first.state.keys()

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
        return self.weights.chunks(name)

    def read(self, name: str, region: Region, out: Array) -> None:
        """See `Reader.read`. Raises UserError where ranks that should hold the same do not."""
        self.weights.read(name, region, out)

    def close(self) -> None:
        self.folder.close()

    def _pieces(self) -> dict[str, dict[int, list[Piece]]]:
        """Return what the ranks hold of each weight, by its name in the whole model and the tensor-parallel rank."""
        first_layers = _first_layers(self.ranks, self.args())
        held: dict[str, dict[int, list[Piece]]] = {}
        for rank, rank_file in self.ranks.items():
            for chunk, state in enumerate(rank_file.models):
                for name, piece in rank_names.pieces(state, rank_file, first=first_layers[chunk, rank.pp], ep=rank.ep):
                    held.setdefault(name, {}).setdefault(rank.tp, []).append(piece)
        return self._untied(held)

    def _untied(self, held: dict[str, dict[int, list[Piece]]]) -> dict[str, dict[int, list[Piece]]]:
        """Count the last stage's copy of a tied embedding as one more copy of it."""
        tied = self.args().get("untie_embeddings_and_output_weights") is False
        if tied and OUTPUT in held and EMBEDDING in held:
            for tp, copies in held.pop(OUTPUT).items():
                held[EMBEDDING].setdefault(tp, []).extend(copies)
        return held


def _first_layers(files: Mapping[Rank, RankFile], args: Mapping[str, Any]) -> dict[tuple[int, int], int]:
    """Return the number of the first layer of each model chunk, by chunk and pipeline rank; stages may be uneven."""
    counts = {
        (chunk, rank.pp): rank_names.count_layers(state, rank_file.name)
        for rank, rank_file in files.items()
        for chunk, state in enumerate(rank_file.models)
    }
    firsts, layers = dict[tuple[int, int], int](), 0
    for chunk_and_stage in sorted(counts):
        firsts[chunk_and_stage] = layers
        layers += counts[chunk_and_stage]
    expected = args.get("num_layers")
    if expected is not None and expected != layers:
        raise UserError(
            f"the files hold {layers} layers, and their `args` say {format_untrusted(expected)}", hint="the files are of two runs"
        )
    return firsts
