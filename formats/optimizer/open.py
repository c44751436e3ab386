"""Open the optimizer state of a Megatron checkpoint by the way it is stored."""

from __future__ import annotations

from formats.errors import UserError
from formats.megatron_reader import MegatronReader
from formats.optimizer import buckets, fsdp, gathered, model_space, numbered, rank_files
from formats.optimizer.state import WEIGHTS_ALONE, OptimizerState
from formats.rank_files import RankFilesReader
from formats.torch_dist import TorchDistReader


def open_optimizer(reader: MegatronReader) -> OptimizerState | None:
    """Return the optimizer state beside the weights that `reader` reads, None where there is none.

    It is read through `reader`, which the caller closes. Raises UserError for state that has no place in the shapes of weights.
    """
    if not reader.has_optimizer:
        return None
    if isinstance(reader, TorchDistReader):
        _refuse_by_layers(reader)
        for read in (model_space.read, buckets.read, gathered.read, fsdp.read, numbered.read):
            if state := read(reader):
                return state
    if isinstance(reader, RankFilesReader):
        return rank_files.read(reader)
    raise UserError(
        f"the optimizer state of `{reader.folder.label}` is stored in a way that is not read",
        hint=WEIGHTS_ALONE,
    )


def _refuse_by_layers(reader: TorchDistReader) -> None:
    if reader.args().get("use_layer_wise_distributed_optimizer"):
        raise UserError(
            f"the optimizer of `{reader.folder.label}` is layer-wise (Muon): its state is not read",
            hint="`--weights-only` leaves it out, where a command has that option",
        )
