"""State of optimizers that are not distributed, in the file of each rank: a number for each weight, group by group.

`optimizer.state[i]` has the moments, `fp32_from_fp16_params[group][j]` the masters of weights that are not fp32. Within a group
weights stand in the order in which layers were built; which group a weight is of, is not said.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from formats.errors import UserError
from formats.optimizer.state import EXP_AVG, EXP_AVG_SQ, MASTER
from formats.optimizer.state_locations import FP32, StateLocations, as_dict, as_sequence, parameters, state_tensor
from formats.rank_folders import RankFile
from formats.rank_names import EMBEDDING, OUTPUT, RankTensor
from formats.spec import Shape, is_size

_MASTERS = "fp32_from_fp16_params"


class _Group:
    """A parameter group, from which weights are taken in order."""

    def __init__(self, file: RankFile, optimizer: Mapping[Any, Any], number: int) -> None:
        self._file = file
        self.settings = as_dict(optimizer["param_groups"][number])
        self._indices = deque(index for index in as_sequence(self.settings.get("params")) if is_size(index))
        self._state = as_dict(optimizer.get("state"))
        self._has_masters = _MASTERS in optimizer
        masters = as_sequence(optimizer.get(_MASTERS))
        self._masters = deque(as_sequence(masters[number]) if number < len(masters) else ())

    def __len__(self) -> int:
        return len(self._indices)

    def shape(self) -> Shape | None:
        """Return the shape of the next weight, None where all are taken."""
        return self._tensor(EXP_AVG).shape if self._indices else None

    def take(self, weight: RankTensor) -> dict[str, RankTensor]:
        """Take the next weight, and return its state."""
        state = {name: self._tensor(name) for name in (EXP_AVG, EXP_AVG_SQ)}
        self._indices.popleft()
        if self._has_masters:
            state[MASTER] = weight if weight.dtype == FP32 else self._master(weight)
        for name, tensor in state.items():
            if tensor.shape != weight.shape:
                raise UserError(
                    f"`{name}` of `{weight.name}` in `{self._file.name}` has shape {list(tensor.shape)}, "
                    f"the weight {list(weight.shape)}",
                    hint="the file is damaged",
                )
        return state

    def _tensor(self, name: str) -> RankTensor:
        state = as_dict(self._state.get(self._indices[0]))
        if name not in state:
            raise UserError(f"`optimizer` in `{self._file.name}` has no `{name}` of its weight {self._indices[0]}")
        return state_tensor(self._file.archive, state[name], name, self._file.name)

    def _master(self, weight: RankTensor) -> RankTensor:
        if not self._masters:
            raise UserError(f"`{_MASTERS}` in `{self._file.name}` has no master of `{weight.name}`", hint="the file is damaged")
        return state_tensor(self._file.archive, self._masters.popleft(), f"{_MASTERS} of {weight.name}", self._file.name)


def add(locations: Mapping[str, StateLocations], file: RankFile, optimizers: Sequence[Mapping[Any, Any]]) -> None:
    """Add where the state of a rank's weights is. Raises UserError where it cannot be told whose state is whose."""
    for number, optimizer in enumerate(optimizers):
        groups = [_Group(file, optimizer, group) for group in range(len(optimizer["param_groups"]))]
        for weight in (weight for chunk in parameters(file, number, len(optimizers)) for weight in chunk):
            if group := group_of(weight, groups, file.name):
                for name, tensor in group.take(weight).items():
                    locations[name].add(file.name, weight, (file.name, tensor.offset))
        if left := sum(len(group) for group in groups):
            raise UserError(
                f"`optimizer` in `{file.name}` has state of {left} weights that are not among the rank's, or in another order",
                hint="the file is damaged, or of a model of another program",
            )


class Group(Protocol):
    """A parameter group of which the next weight's shape is known."""

    settings: Mapping[str, Any]

    def shape(self) -> Shape | None: ...


class Weight(Protocol):
    """A weight whose group is asked for."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> Shape: ...


def group_of[AnyGroup: Group](weight: Weight, groups: Sequence[AnyGroup], label: str) -> AnyGroup | None:
    """Return the group that a weight is of, None for a frozen weight: its next weight has the same shape. `label` names the
    checkpoint.

    Of several groups, biases and norms are in that without weight decay, embeddings in that with a learning rate of their own.
    """
    fitting = [group for group in groups if group.shape() == weight.shape]
    decays = len(weight.shape) > 1 and not weight.name.endswith(".bias")
    decoupled = weight.name in (EMBEDDING, OUTPUT)
    for name, expected in (("is_decoupled_lr", decoupled), ("wd_mult", decays)):
        if len(fitting) > 1:
            fitting = [group for group in fitting if group.settings.get(name, expected) == expected]
    if len(fitting) > 1:
        raise UserError(f"`{weight.name}` in `{label}` may be in {len(fitting)} of the optimizer's groups")
    return fitting[0] if fitting else None
