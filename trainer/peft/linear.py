"""Describe a linear layer for an adapter: this rank's part of the weight, and how the layer is parallelized.

Covers the layers of megatron-core, with or without Transformer Engine, and of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from formats.errors import UserError

COLUMN, ROW, REPLICATED = 0, 1, None
"""The axis of the weight that is sharded over tensor-parallel ranks: outputs, inputs, none."""

_AXES = {
    "ColumnParallelLinear": COLUMN,
    "TEColumnParallelLinear": COLUMN,
    "TELayerNormColumnParallelLinear": COLUMN,
    "RowParallelLinear": ROW,
    "TERowParallelLinear": ROW,
    "TEColumnParallelGroupedLinear": COLUMN,
    "TERowParallelGroupedLinear": ROW,
    "TELinear": REPLICATED,
    "Router": REPLICATED,
    "Linear": REPLICATED,
}


@dataclass(frozen=True)
class GroupedExperts:
    """The experts whose weights one layer has on this rank (megatron-core's grouped GEMM)."""

    local: int
    first: int
    """The number of the first of them, of all experts."""

    total: int
    replicas: Any
    """The group of ranks with the same experts."""


@dataclass(frozen=True)
class Linear:
    """A linear layer on this rank: its weight is [rows, columns], that is [outputs, inputs]."""

    name: str
    rows: int
    columns: int
    axis: int | None
    tp_group: Any
    """The tensor-parallel group, which shards or replicates the weight."""

    expert: bool
    """Whether it belongs to an expert; the dispatcher, not the layer, then communicates inputs and outputs."""

    sequence_parallel: bool
    """Whether its input (column-parallel) or output (row-parallel) is sharded along the sequence."""

    gated: bool
    """Whether its outputs are those of gate and up."""

    allreduce: bool
    """megatron-core's parameter attribute: False if gradients are reduced over the ranks with the same experts only."""

    dtype: torch.dtype
    device: torch.device
    grouped: GroupedExperts | None = None
    """Several experts in one layer, each with a weight [rows, columns]; None for a layer with one weight."""

    @property
    def is_router(self) -> bool:
        """Return whether its outputs are the logits of a router."""
        return self.name.endswith(".router")

    @property
    def is_sharded(self) -> bool:
        """Return whether the weight is sharded over several ranks."""
        return self.axis is not REPLICATED and self.tp_group.size() > 1


def describe_linear(module: torch.nn.Module, name: str) -> Linear:
    """Describe a module. Raises UserError if it is not a linear layer, or not one that an adapter can be added to."""
    config = getattr(module, "config", None)
    axis = _axis(module, name)
    weight: Any = _weight(module, name)
    grouped = _grouped_experts(module)
    expert = ".local_experts." in name or grouped is not None
    group = getattr(module, "_tp_group", None) or getattr(module, "tp_group", None)
    group = group or parallel_state.get_tensor_model_parallel_group()
    _check_communication(name, config, ranks=group.size())
    _check_rows(name)
    sequence = bool(getattr(config, "sequence_parallel", False)) and group.size() > 1 and not expert
    return Linear(
        name=name,
        rows=weight.shape[0],
        columns=weight.shape[1],
        axis=axis,
        tp_group=group,
        expert=expert,
        sequence_parallel=sequence and (axis is not REPLICATED or getattr(weight, "sequence_parallel", False)),
        gated=bool(getattr(config, "gated_linear_unit", False)) and name.endswith("linear_fc1"),
        allreduce=getattr(weight, "allreduce", True),
        dtype=weight.dtype,
        device=weight.device,
        grouped=grouped,
    )


def _check_communication(name: str, config: Any, *, ranks: int) -> None:
    """Refuse a layer outside which its own inputs are gathered and its outputs are reduced: the adapter's would not be."""
    if ".shared_experts." in name and ranks > 1 and getattr(config, "moe_shared_expert_overlap", False):
        raise UserError(
            f"no adapter can be added to `{name}`: with `model.moe_shared_expert_overlap` and "
            f"`model.tensor_model_parallel_size` `{ranks}`, ranks exchange its tokens outside the layer",
            hint="set `model.moe_shared_expert_overlap=false`, or `peft.exclude_modules=['*.shared_experts.*']`",
        )


def _check_rows(name: str) -> None:
    """Refuse the layer before a state, whose outputs are sections that ranks divide one by one: an adapter's rows would be saved
    in the order of the ranks."""
    if name.rpartition(".")[2] == "in_proj":
        raise UserError(
            f"no adapter can be added to `{name}`: ranks divide its outputs section by section",
            hint="leave it out: `peft.exclude_modules=['in_proj']`",
        )


def _grouped_experts(module: Any) -> GroupedExperts | None:
    if not hasattr(module, "num_gemms"):
        return None
    groups, local = module._pg_collection, module.num_gemms
    return GroupedExperts(local, groups.ep.rank() * local, groups.ep.size() * local, groups.expt_dp)


def _axis(module: torch.nn.Module, name: str) -> int | None:
    names = [base.__name__ for base in type(module).__mro__]
    linear_classes = [name for name in names if name in _AXES]
    if not linear_classes:
        raise UserError(
            f"`{name}` is a `{type(module).__name__}`, to which no adapter can be added",
            hint="`peft.target_modules` should name linear layers",
        )
    return _AXES[linear_classes[0]]


def _weight(module: torch.nn.Module, name: str) -> torch.Tensor:
    weight = getattr(module, "weight0" if hasattr(module, "num_gemms") else "weight", None)
    if name.endswith("output_layer") or not isinstance(weight, torch.Tensor):
        raise UserError(f"no adapter can be added to `{name}`", hint="leave it out of `peft.target_modules`")
    config = getattr(module, "config", None)
    if getattr(config, "use_transformer_engine_op_fuser", False):
        raise UserError(
            "`model.use_transformer_engine_op_fuser` is `true`, which bypasses the layers that adapters are added to",
            hint="leave it out",
        )
    return weight
