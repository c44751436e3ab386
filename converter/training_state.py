"""Say what a Megatron checkpoint holds of a training run beside its weights. Reads headers and small objects alone."""

from __future__ import annotations

from dataclasses import dataclass

from formats.errors import UserError
from formats.megatron_reader import MegatronReader
from formats.optimizer.open import open_optimizer
from formats.optimizer.state import EXP_AVG, EXP_AVG_SQ, MASTER, OptimizerState
from formats.spec import is_size

_SCHEDULER, _RANDOM = "opt_param_scheduler", "rng_state"
"""What megatron-core calls them."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a run would resume from. Counts are of weights."""

    iteration: int | None
    """The step; None where the checkpoint does not say it."""

    scheduler: bool
    random_numbers: bool
    """The state of random number generators."""

    optimizer: str = ""
    """How the optimizer's state is stored, in megatron-core's words; empty where there is none, or it is not read."""

    masters: int = 0
    """Those with fp32 masters in the optimizer's state."""

    moments: int = 0
    """Those with both of Adam's moments."""

    not_read: str = ""
    """Why the optimizer's state is not read."""


def training_state(reader: MegatronReader) -> TrainingState:
    """Return what a checkpoint holds beside its weights. State that is damaged or not read is described by the reason."""
    step, contents = reader.common_state().get("iteration"), reader.contents
    state, not_read = _optimizer(reader)
    held = {name: set(tensors.specs) for name, tensors in state.states.items()} if state else {}
    return TrainingState(
        iteration=step if is_size(step) else None,
        scheduler=_SCHEDULER in contents,
        random_numbers=_RANDOM in contents,
        optimizer=state.kind if state else "",
        masters=len(held.get(MASTER, ())),
        moments=len(held.get(EXP_AVG, set()) & held.get(EXP_AVG_SQ, set())),
        not_read=not_read,
    )


def _optimizer(reader: MegatronReader) -> tuple[OptimizerState | None, str]:
    try:
        return open_optimizer(reader), ""
    except UserError as error:
        return None, str(error.args[0])
