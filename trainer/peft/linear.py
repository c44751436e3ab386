"""What an adapter must know of a linear layer: its share of the weight, and how ranks divide the work.

Knows megatron-core's layers, those over Transformer Engine among them, and torch's. Knows no method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from formats.errors import UserError

COLUMN, ROW, WHOLE = 0, 1, None
"""The axis of the weight along which tensor-parallel ranks divide it: outputs, inputs, not at all."""

_AXES = {
    "ColumnParallelLinear": COLUMN,
    "TEColumnParallelLinear": COLUMN,
    "TELayerNormColumnParallelLinear": COLUMN,
    "RowParallelLinear": ROW,
    "TERowParallelLinear": ROW,
    "TELinear": WHOLE,
    "Linear": WHOLE,
}
_GROUPED = "TEGroupedLinear"


@dataclass(frozen=True)
class Linear:
    """A linear layer as this rank holds it: `rows` outputs, `columns` inputs."""

    name: str
    rows: int
    columns: int
    axis: int | None
    group: Any
    """The ranks that divide the weight, or have copies of it."""

    expert: bool
    """One of many experts: what it is given and what it answers is sent elsewhere, not by the layer."""

    sequence_parallel: bool
    """Its input (outputs divided) or its output (inputs divided) is cut along the sequence."""

    gated: bool
    """Its outputs are those of two layers, gate and up."""

    allreduce: bool
    """As megatron-core's parameters have it: False where gradients are reduced among the ranks with the same experts."""

    dtype: torch.dtype
    device: torch.device

    @property
    def divided(self) -> bool:
        """Do several ranks share the weight?"""
        return self.axis is not WHOLE and self.group.size() > 1


def describe(module: torch.nn.Module, name: str) -> Linear:
    """UserError for a module that is no linear layer, or one that no adapter can be added to."""
    config = getattr(module, "config", None)
    axis = _axis(module, name)
    weight: Any = _weight(module, name)
    expert = ".local_experts." in name
    group = getattr(module, "_tp_group", None) or getattr(module, "tp_group", None)
    group = group or parallel_state.get_tensor_model_parallel_group()
    sequence = bool(getattr(config, "sequence_parallel", False)) and group.size() > 1 and not expert
    return Linear(
        name=name,
        rows=weight.shape[0],
        columns=weight.shape[1],
        axis=axis,
        group=group,
        expert=expert,
        sequence_parallel=sequence and (axis is not WHOLE or getattr(weight, "sequence_parallel", False)),
        gated=bool(getattr(config, "gated_linear_unit", False)) and name.endswith("linear_fc1"),
        allreduce=getattr(weight, "allreduce", True),
        dtype=weight.dtype,
        device=weight.device,
    )


def _axis(module: torch.nn.Module, name: str) -> int | None:
    names = [one.__name__ for one in type(module).__mro__]
    if _GROUPED in names:
        raise UserError(
            f"`{name}` computes several experts at once, to which no adapter can be added",
            hint="set `model.moe_grouped_gemm=false`, or leave the experts out with `peft.exclude_modules='[*.experts.*]'`",
        )
    known = [one for one in names if one in _AXES]
    if not known:
        raise UserError(
            f"`{name}` is a `{type(module).__name__}`, to which no adapter can be added",
            hint="`peft.target_modules` should name linear layers",
        )
    return _AXES[known[0]]


def _weight(module: torch.nn.Module, name: str) -> torch.Tensor:
    weight = getattr(module, "weight", None)
    if name.endswith("output_layer") or not isinstance(weight, torch.Tensor):
        raise UserError(f"no adapter can be added to `{name}`", hint="leave it out of `peft.target_modules`")
    config = getattr(module, "config", None)
    if getattr(config, "use_transformer_engine_op_fuser", False):
        raise UserError(
            "`model.use_transformer_engine_op_fuser` is `true`, which passes by the layers that adapters are added to",
            hint="leave it out",
        )
    return weight
