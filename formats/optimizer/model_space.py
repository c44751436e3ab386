"""Read optimizer state that is stored like the weights: each under its key with a prefix, in the weight's shape.

megatron-core's distributed optimizer writes it as `fully_reshardable` (0.15 and later), its other optimizers and PyTorch's FSDP2
always; the latter call the weights in fp32 `fp32_param`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from formats.errors import UserError
from formats.optimizer.state import EXP_AVG, EXP_AVG_SQ, MASTER, OptimizerState
from formats.spec import Reader
from formats.torch_dist import TorchDistReader

_PREFIXES = {
    EXP_AVG: ("optimizer.state.exp_avg.",),
    EXP_AVG_SQ: ("optimizer.state.exp_avg_sq.",),
    MASTER: ("optimizer.state.param.", "optimizer.state.fp32_param."),
}
PLAIN = "plain"
"""The kind of an optimizer that is not distributed: megatron-core has no word for it."""


def read(reader: TorchDistReader) -> OptimizerState | None:
    """Return the state that is stored in the shapes of the weights, None where none is."""
    states = {name: state for name, prefixes in _PREFIXES.items() if (state := _first(reader, prefixes))}
    if not states:
        return None
    optimizers = chained(reader.common_state().get("optimizer"))
    kinds = sorted({str(each.get("param_state_sharding_type", PLAIN)) for each in optimizers}) or [PLAIN]
    if len(kinds) > 1:
        raise UserError(f"the checkpoint's optimizers are stored in different ways: {', '.join(kinds)}")
    return OptimizerState(kinds[0], states, [_param_groups(reader, each) for each in optimizers])


def _first(reader: TorchDistReader, prefixes: Sequence[str]) -> Reader | None:
    readers = (reader.state(prefix) for prefix in prefixes)
    return next((state for state in readers if state.specs), None)


def chained(optimizer: Any) -> list[dict[Any, Any]]:
    """Return the states of the optimizers in a common state: megatron-core numbers those of a model with experts."""
    match optimizer:
        case {0: {**first}, **others}:
            return [first, *(each for _, each in sorted(others.items()) if isinstance(each, dict))]
        case {**only}:
            return [only]
        case _:
            return []


def _param_groups(reader: TorchDistReader, optimizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the hyper-parameters of an optimizer's groups, with its `step`. Raises UserError where there are none."""
    match optimizer.get("optimizer"):
        case {"param_groups": [*groups], "state": {"common_step": step}} if archive := reader.common_archive():
            return [{**group, "step": archive.array(step).item()} for group in groups]
        case {"param_groups": [*groups]}:
            return groups
        case _:
            raise UserError("the checkpoint's optimizer has no `param_groups`", hint="the checkpoint is damaged")
