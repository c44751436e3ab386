"""Read optimizer state that is stored like the weights: each under its key with a prefix.

megatron-core's distributed optimizer writes it as `fully_reshardable` (0.15 and later) and, flattened, as
`fully_sharded_model_space` (0.5 to 0.14), its other optimizers and PyTorch's FSDP2 always; all but the first call the weights in
fp32 `fp32_param`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from formats.container import Container
from formats.errors import UserError
from formats.optimizer.flattened import unflattened
from formats.optimizer.state import EXP_AVG, EXP_AVG_SQ, LOSS_SCALE, MASTER, WEIGHTS_ALONE, OptimizerState
from formats.spec import Reader
from formats.torch_dist import TorchDistReader

_PREFIXES = {
    EXP_AVG: ("optimizer.state.exp_avg.",),
    EXP_AVG_SQ: ("optimizer.state.exp_avg_sq.",),
    MASTER: ("optimizer.state.param.", "optimizer.state.fp32_param."),
}
_OF_WEIGHT = re.compile(r"optimizer\.state\.([a-z0-9_]+)\.(.+)")
PLAIN = "plain"
"""The kind of an optimizer that is not distributed: megatron-core has no word for it."""


def read(reader: TorchDistReader) -> OptimizerState | None:
    """Return the state that is stored in the shapes of the weights, None where none is."""
    container = unflattened(reader.container)
    _check(container)
    states = {name: state for name, prefixes in _PREFIXES.items() if (state := _first(reader, container, prefixes))}
    if not states:
        return None
    optimizers = chained(reader.common_state().get("optimizer"))
    groups = [_param_groups(reader, each) for each in optimizers]
    return OptimizerState(kind(optimizers), states, groups, _loss_scale(reader, optimizers))


def _first(reader: TorchDistReader, container: Container, prefixes: Sequence[str]) -> Reader | None:
    readers = (TorchDistReader(reader.folder, prefix=prefix, container=container) for prefix in prefixes)
    return next((state for state in readers if state.specs), None)


def _check(container: Container) -> None:
    """Raise UserError for state of a weight that is not Adam's, or not in the weight's shape."""
    weights = set(container.tensor_names)
    known = tuple(prefix for prefixes in _PREFIXES.values() for prefix in prefixes)
    for name in weights:
        match = _OF_WEIGHT.fullmatch(name)
        if not match or match[2] not in weights:
            continue
        if not name.startswith(known):
            raise UserError(
                f"the optimizer keeps `{match[1]}` of `{match[2]}`: it is not Adam, whose state alone is read",
                hint=WEIGHTS_ALONE,
            )
        if container.shape(name) != container.shape(match[2]):
            raise UserError(
                f"`{name}` has shape {list(container.shape(name))}, and `{match[2]}` has {list(container.shape(match[2]))}",
                hint="the checkpoint is damaged, or was written by a version of megatron-core that is not known here",
            )


def kind(optimizers: Sequence[Mapping[Any, Any]]) -> str:
    """Return how the optimizers of a common state are stored. Raises UserError where they differ."""
    kinds = sorted({str(each.get("param_state_sharding_type", PLAIN)) for each in optimizers}) or [PLAIN]
    if len(kinds) > 1:
        raise UserError(f"the checkpoint's optimizers are stored in different ways: {', '.join(kinds)}")
    return kinds[0]


def chained(optimizer: Any) -> list[dict[Any, Any]]:
    """Return the states of the optimizers in a common state: megatron-core numbers those of a model with experts."""
    match optimizer:
        case {0: {**first}, **others}:
            numbers = sorted(number for number in others if isinstance(number, int))
            return [first, *(each for number in numbers if isinstance(each := others[number], dict))]
        case {**only}:
            return [only]
        case _:
            return []


def _loss_scale(reader: TorchDistReader, optimizers: Sequence[Mapping[Any, Any]]) -> Mapping[str, Any]:
    """Return the loss scale, which all optimizers share."""
    first, archive = next((each[LOSS_SCALE] for each in optimizers if each.get(LOSS_SCALE)), None), reader.common_archive()
    return archive.resolved(first) if archive and isinstance(first, dict) else {}


def _param_groups(reader: TorchDistReader, optimizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the hyper-parameters of an optimizer's groups, with its `step`. Raises UserError where there are none."""
    match optimizer.get("optimizer"):
        case {"param_groups": [*groups], "state": {"common_step": step}} if archive := reader.common_archive():
            return [{**group, "step": archive.array(step).item()} for group in groups]
        case {"param_groups": [*groups]}:
            return groups
        case _:
            raise UserError("the checkpoint's optimizer has no `param_groups`", hint="the checkpoint is damaged")
