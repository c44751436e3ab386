"""Read the optimizer state of format `torch_dcp`: a number for each weight, group by group, as torch's optimizers count them.

`optimizer.optimizer.state.I` has the moments, `optimizer.fp32_from_fp16_params.GROUP.J` the masters of weights that are not fp32.
Within a group weights stand in the order in which layers were built, which is that of the index. Layout: Megatron-LM 0.19's
`--ckpt-format torch_dcp`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from formats.container import Container
from formats.errors import UserError
from formats.iterations import TORCH_DCP
from formats.optimizer.rank_plain import group_of
from formats.optimizer.state import EXP_AVG, EXP_AVG_SQ, LOSS_SCALE, MASTER, STATES, OptimizerState
from formats.optimizer.state_locations import as_dict, as_sequence
from formats.renamed_container import RenamedContainer
from formats.spec import DTYPES, Array, Shape, TensorSpec, is_size
from formats.torch_dist import TorchDistReader

_SETTING = re.compile(r"optimizer\.optimizer\.param_groups\.([0-9]{1,4})\.(\w+)")
_STATE, _MASTERS = "optimizer.optimizer.state", "optimizer.fp32_from_fp16_params"
_LOSS_SCALE = f"optimizer.{LOSS_SCALE}."


def read(reader: TorchDistReader) -> OptimizerState | None:
    """Return the state that is stored by numbers, None where none is. Raises UserError where it cannot be told whose it is."""
    groups = [_Group(reader.container, number, settings) for number, settings in sorted(_settings(reader.container).items())]
    if not groups:
        return None
    keys: dict[str, dict[str, str]] = {state: {} for state in STATES}
    for name, spec in reader.specs.items():
        if group := group_of(spec, groups, reader.folder.label):
            for state, key in group.take(spec).items():
                keys[state][name] = key
    if left := sum(len(group) for group in groups):
        raise UserError(f"the optimizer has state of {left} weights that are not there, or in another order")
    states = {
        state: TorchDistReader(reader.folder, container=RenamedContainer(reader.container, held))
        for state, held in keys.items()
        if held
    }
    return OptimizerState(TORCH_DCP, states, [[group.hyper_parameters for group in groups]], _loss_scale(reader.container))


def _settings(container: Container) -> dict[int, dict[str, Any]]:
    """Return the settings of every group: each is an object of its own."""
    groups: dict[int, dict[str, Any]] = {}
    for name in sorted(container.object_names):
        if match := _SETTING.fullmatch(name):
            groups.setdefault(int(match[1]), {})[match[2]] = container.archive(name).pickle()
    return groups


def _loss_scale(container: Container) -> dict[str, Any]:
    """Return the loss scale, of which each field is a tensor or an object of its own."""
    fields: dict[str, Any] = {}
    for name in container.object_names:
        if name.startswith(_LOSS_SCALE):
            fields[name.removeprefix(_LOSS_SCALE)] = container.archive(name).pickle()
    for name in container.tensor_names:
        if name.startswith(_LOSS_SCALE):
            fields[name.removeprefix(_LOSS_SCALE)] = _small(container, name)
    return fields


def _small(container: Container, name: str) -> Array:
    tensor = container.tensor(name)
    value = np.empty(tensor.shape, tensor.dtype)
    container.read(tensor, tuple(slice(0, size) for size in tensor.shape), value)
    return value


class _Group:
    """A parameter group, from which weights are taken in order."""

    def __init__(self, container: Container, number: int, settings: Mapping[str, Any]) -> None:
        self._container, self._tensors = container, set(container.tensor_names)
        self.settings = as_dict(settings)
        self._indices = deque(index for index in as_sequence(settings.get("params")) if is_size(index))
        prefix = f"{_MASTERS}.{number}."
        count = sum(name.startswith(prefix) for name in self._tensors)
        self._masters = deque(f"{prefix}{position}" for position in range(count))
        self._has_masters = any(name.startswith(_MASTERS) for name in self._tensors)
        known = {name: value for name, value in settings.items() if name != "params"}
        self.hyper_parameters = {**known, **({"step": self._step()} if self._indices and "step" not in known else {})}

    def __len__(self) -> int:
        return len(self._indices)

    def shape(self) -> Shape | None:
        """Return the shape of the next weight, None where all are taken."""
        return self._container.shape(self._key(EXP_AVG)) if self._indices else None

    def take(self, weight: TensorSpec) -> dict[str, str]:
        """Take the next weight, and return the keys of its state."""
        keys = {state: self._key(state) for state in (EXP_AVG, EXP_AVG_SQ)}
        self._indices.popleft()
        if self._has_masters and weight.dtype != DTYPES["fp32"]:
            if not self._masters:
                raise UserError(f"the optimizer has no master of `{weight.name}`", hint="the checkpoint is incomplete")
            keys[MASTER] = self._masters.popleft()
        for state, key in keys.items():
            if (shape := self._container.shape(key)) != weight.shape:
                raise UserError(f"`{state}` of `{weight.name}` has shape {list(shape)}, the weight {list(weight.shape)}")
        return keys

    def _key(self, state: str) -> str:
        key = f"{_STATE}.{self._indices[0]}.{state}"
        if key not in self._tensors:
            raise UserError(
                f"the optimizer has no `{state}` of its weight {self._indices[0]}", hint="the checkpoint is incomplete"
            )
        return key

    def _step(self) -> float:
        return float(_small(self._container, self._key("step")).reshape(-1)[0])
