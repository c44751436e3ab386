"""Read the optimizer state of format `fsdp_dtensor`: each weight's under `optimizer.state.`, its name and what it is.

The weights are in fp32, and their own masters. Hyper-parameters are an object each, for every weight: those of weights that agree
in all of them are a group. Layout: megatron-core 0.19's `DistributedOptimizer.sharded_param_state_fsdp_dtensor`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from formats.container import Container
from formats.errors import UserError
from formats.iterations import FSDP_DTENSOR
from formats.optimizer.state import EXP_AVG, EXP_AVG_SQ, MASTER, OptimizerState
from formats.rank_names import with_expert
from formats.renamed_container import RenamedContainer
from formats.spec import DTYPES, RenamedReader
from formats.torch_dist import GATE, TorchDistReader

_STATE = re.compile(r"optimizer\.state\.(?:module\.)+(.+)\.(\w+)")
_META = re.compile(r"optimizer\.param_to_group_meta\.(?:module\.)+(.+)\.(\w+)")
_STEP, _EXPERTS = "step", "is_expert_parallel"
_KNOWN = (EXP_AVG, EXP_AVG_SQ, _STEP)


def read(reader: TorchDistReader) -> OptimizerState | None:
    """Return the state that is stored by the names of weights, None where none is."""
    names = _names(reader.container)
    if not names.get(EXP_AVG):
        return None
    moments = {state: _state(reader, names[state]) for state in (EXP_AVG, EXP_AVG_SQ) if state in names}
    _check_whole(reader, moments)
    masters = [name for name in moments[EXP_AVG].specs if reader.specs[name].dtype == DTYPES["fp32"]]
    groups = _groups(reader, moments[EXP_AVG].specs, names.get(_STEP, {}))
    states = {**moments, **({MASTER: RenamedReader(reader, {name: name for name in masters})} if masters else {})}
    return OptimizerState(FSDP_DTENSOR, states, groups)


def _names(container: Container) -> dict[str, dict[str, str]]:
    """Return what is kept of weights, by its kind: the weight's name in its state dict, and the key. Raises UserError for state
    that is not Adam's."""
    names: dict[str, dict[str, str]] = {}
    for key in container.tensor_names:
        if match := _STATE.fullmatch(key):
            names.setdefault(match[2], {})[match[1]] = key
    for state in names.keys() - {*_KNOWN}:
        raise UserError(
            f"the optimizer keeps `{state}` of `{next(iter(names[state]))}`: it is not Adam, whose state alone is read",
            hint="`--weights-only` leaves it out, where a command has that option",
        )
    return names


def _state(reader: TorchDistReader, keys: Mapping[str, str]) -> TorchDistReader:
    """Return a reader of one state, under the names of weights: halves of gated projections are joined as theirs are."""
    return TorchDistReader(reader.folder, container=RenamedContainer(reader.container, keys))


def _check_whole(reader: TorchDistReader, moments: Mapping[str, TorchDistReader]) -> None:
    """Raise UserError unless all moments are of the same weights, in their shapes."""
    first = moments[EXP_AVG]
    for state, moment in moments.items():
        if missing := sorted(first.specs.keys() ^ moment.specs.keys()):
            raise UserError(f"`{missing[0]}` has `{EXP_AVG}` or `{state}`, and not both", hint="the checkpoint is incomplete")
        for name, spec in moment.specs.items():
            if name not in reader.specs or reader.specs[name].shape != spec.shape:
                shape = list(reader.specs[name].shape) if name in reader.specs else "no such weight"
                raise UserError(
                    f"`{state}` of `{name}` has shape {list(spec.shape)}, the weight has {shape}",
                    hint="the checkpoint is damaged",
                )


def _groups(reader: TorchDistReader, weights: Iterable[str], steps: Mapping[str, str]) -> Sequence[Sequence[Mapping[str, Any]]]:
    """Return the parameter groups in the order of the weights: those of weights without experts, and where there are some those
    of experts."""
    metas, groups = _metas(reader), list[dict[str, Any]]()
    if missing := sorted({*weights} - {with_expert(name) for name in metas}):
        raise UserError(f"`{missing[0]}` has optimizer state and no hyper-parameters", hint="the checkpoint is incomplete")
    order = {name: number for number, name in enumerate(reader.specs)}
    for name in sorted(metas, key=lambda name: order.get(with_expert(name), len(order))):
        meta = metas[name]
        group = {**meta, **({_STEP: _step(reader, steps, name)} if steps else {})}
        if group not in groups:
            groups.append(group)
    _check_steps(groups)
    divided = ([group for group in groups if bool(group.get(_EXPERTS)) == experts] for experts in (False, True))
    return [some for some in divided if some]


def _metas(reader: TorchDistReader) -> dict[str, dict[str, Any]]:
    """Return the hyper-parameters of each weight, in the order of the weights' names."""
    metas: dict[str, dict[str, Any]] = {}
    for key in sorted(str(name) for name in reader.container.object_names):
        if match := _META.fullmatch(key):
            metas.setdefault(match[1], {})[match[2]] = reader.container.archive(key).pickle()
    for name, meta in metas.items():
        first = next(iter(metas.values()))
        if lacking := sorted(first.keys() ^ meta.keys()):
            raise UserError(
                f"`{name}` and `{next(iter(metas))}` do not have the same hyper-parameters: `{lacking[0]}` is of one alone",
                hint="the checkpoint is incomplete",
            )
    return metas


def _step(reader: TorchDistReader, steps: Mapping[str, str], name: str) -> int:
    """Return the step of a weight, a number that is stored as a tensor; of a gated projection, that of its gate."""
    key = steps.get(name) or steps.get(f"{name}{GATE}")
    if key is None:
        raise UserError(f"the optimizer keeps no `{_STEP}` of `{name}`", hint="the checkpoint is incomplete")
    tensor = reader.container.tensor(key)
    value = np.empty(tensor.shape, tensor.dtype)
    reader.container.read(tensor, tuple(slice(0, size) for size in tensor.shape), value)
    return int(value.reshape(-1)[0])


def _check_steps(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where weights were updated a different number of times."""
    steps = sorted({group[_STEP] for group in groups if _STEP in group})
    if len(steps) > 1:
        raise UserError(
            f"`{_STEP}` of the optimizer is {steps[0]} for some weights and {steps[-1]} for others",
            hint="the checkpoint was mixed from two",
        )
