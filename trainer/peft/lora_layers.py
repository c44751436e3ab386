"""The LoRA adapter: matrices A [r, inputs] and B [outputs, r] beside a linear layer, sharded like the layer.

For a column-parallel layer, A is replicated and B is sharded along its outputs. For a row-parallel layer, A is sharded along its
inputs and B is replicated. Ranks exchange activations of width r only.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Protocol

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name

from trainer.peft.adapter_layer import Adapter
from trainer.peft.fused_add import FusedAdd
from trainer.peft.linear import COLUMN, ROW, Linear


class LoraSettings(Protocol):
    """The hyperparameters that an adapter is built from: `trainer.peft.lora.LoRA`."""

    @property
    def dim(self) -> int:
        """The rank r."""
        ...

    @property
    def scale(self) -> float:
        """The factor s of B·A."""
        ...

    @property
    def dropout(self) -> float:
        """The dropout probability of the adapter's input."""
        ...

    @property
    def a_init(self) -> str:
        """The initializer of A: `kaiming`, `xavier` or `normal`."""
        ...


class LoraWeight(torch.nn.Module):
    """The weight [rows, columns] of A or B on this rank; [experts, rows, columns] for a layer with several experts."""

    def __init__(self, linear: Linear, rows: int, columns: int, *, axis: int | None, stride: int = 1) -> None:
        """`axis` is the sharded one. None means replicated; with sequence parallelism the gradient is then summed over ranks."""
        super().__init__()
        experts = () if linear.grouped is None else (linear.grouped.local,)
        self.weight = torch.nn.Parameter(torch.empty(*experts, rows, columns, dtype=linear.dtype, device=linear.device))
        set_parallel_attributes(self.weight, linear, axis=None if axis is None else axis + len(experts), stride=stride)

    def forward(self) -> torch.Tensor:
        """Return the weight. megatron-core gathers distributed parameters before the `forward` of the module that has them."""
        return self.weight


def set_parallel_attributes(parameter: torch.nn.Parameter, linear: Linear, *, axis: int | None, stride: int = 1) -> None:
    """Set megatron-core's attributes: the sharded axis of a parameter, and the ranks over which its gradient is reduced."""
    set_tensor_model_parallel_attributes(parameter, axis is not None, -1 if axis is None else axis, stride)
    parameter.allreduce = linear.allreduce  # type: ignore[attr-defined]
    parameter.sequence_parallel = linear.sequence_parallel and axis is None  # type: ignore[attr-defined]


def make_lora_matrices(linear: Linear, settings: LoraSettings, *, rows: int, stride: int = 1) -> tuple[LoraWeight, LoraWeight]:
    """Return A [r, inputs] and B [rows, r] for `rows` outputs of a layer on this rank."""
    a = LoraWeight(linear, settings.dim, linear.columns, axis=ROW if linear.axis == ROW else None)
    return a, LoraWeight(linear, rows, settings.dim, axis=COLUMN if linear.axis == COLUMN else None, stride=stride)


@torch.no_grad()
def init_lora_a(a: torch.Tensor, linear: Linear, settings: LoraSettings, generator: torch.Generator) -> None:
    """Initialize A as on a single rank, and copy this rank's columns of it."""
    ranks = linear.tp_group.size() if linear.axis == ROW else 1
    full = torch.empty(a.shape[0], linear.columns * ranks)
    if settings.a_init == "kaiming":
        torch.nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
    elif settings.a_init == "xavier":
        torch.nn.init.xavier_uniform_(full, generator=generator)
    else:
        torch.nn.init.normal_(full, std=1 / a.shape[0], generator=generator)
    a.copy_(full.chunk(ranks, dim=1)[linear.tp_group.rank() if ranks > 1 else 0])


class LoraAdapter(Adapter):
    """Adds s·B·A·x to a layer's output, with one A and one B for the whole layer."""

    def __init__(self, linear: Linear, settings: LoraSettings) -> None:
        super().__init__()
        self.linear, self.group = linear, linear.tp_group
        self.sequence_parallel = linear.sequence_parallel  # generation switches off attributes of this name
        self.settings, self.scale, self.dropout = settings, settings.scale, settings.dropout
        self.make_matrices()

    def make_matrices(self) -> None:
        """Create the parameters, uninitialized."""
        self.linear_in, self.linear_out = make_lora_matrices(
            self.linear, self.settings, rows=self.linear.rows, stride=2 if self.linear.gated else 1
        )

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize A at random and B with zeros."""
        for name, parameter in self.named_parameters():
            if name.endswith("linear_in.weight"):
                init_lora_a(parameter, self.linear, self.settings, generator)
            elif name.endswith("linear_out.weight"):
                torch.nn.init.zeros_(parameter)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B such that B·A is the whole adapter."""
        return self.linear_in(), self.linear_out()

    def forward(self, output: torch.Tensor, layer_input: torch.Tensor) -> torch.Tensor:
        """Return output + s·B·A·x."""
        a, b = self._sum_expert_gradients(*self.matrices())
        hidden = torch.nn.functional.linear(self._apply_dropout(layer_input), a)
        scaled = hidden if self.scale == 1 else hidden * self.scale
        return FusedAdd.apply(output, self._communicate(scaled), b)

    def _sum_expert_gradients(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the gradient of the replicated matrix over ranks for a sharded expert, whose ranks compute partial sums."""
        if not (self.linear.expert and self.linear.is_sharded):
            return a, b
        if self.linear.axis == COLUMN:
            return tensor_parallel.copy_to_tensor_model_parallel_region(a, group=self.group), b
        return a, tensor_parallel.copy_to_tensor_model_parallel_region(b, group=self.group)

    def _communicate(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return A·x [..., r] as the input of B: reduced for row-parallel layers; its gradient is reduced for column-parallel
        ones."""
        if self.linear.expert or not self.linear.is_sharded:
            return hidden
        if self.linear.axis == COLUMN:
            gather = tensor_parallel.gather_from_sequence_parallel_region
            communicate = gather if self.sequence_parallel else tensor_parallel.copy_to_tensor_model_parallel_region
        else:
            reduce_scatter = tensor_parallel.reduce_scatter_to_sequence_parallel_region
            all_reduce = tensor_parallel.reduce_from_tensor_model_parallel_region
            communicate = reduce_scatter if self.sequence_parallel else all_reduce
        return communicate(hidden, group=self.group)

    def _apply_dropout(self, layer_input: torch.Tensor) -> torch.Tensor:
        """Apply dropout with the same mask on ranks with the same input, and with separate masks on ranks with parts of it."""
        if not self.dropout or not self.training:
            return layer_input
        sharded_input = self.linear.expert or (self.linear.is_sharded and (self.linear.axis == ROW or self.sequence_parallel))
        name = [get_expert_parallel_rng_tracker_name()] if self.linear.expert else []
        with tensor_parallel.get_cuda_rng_tracker().fork(*name) if sharded_input else nullcontext():
            return torch.nn.functional.dropout(layer_input, self.dropout)
