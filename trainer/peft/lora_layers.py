"""Two thin matrices beside a linear layer, divided among ranks as the layer is.

Where ranks divide W by its outputs, each has the whole of A and its rows of B; where by its inputs, its columns of A and the
whole of B. What ranks exchange is r wide, never as wide as the layer.
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


class Matrix(torch.nn.Module):
    """One weight, [rows, columns] of this rank."""

    def __init__(self, linear: Linear, rows: int, columns: int, *, axis: int | None, stride: int = 1) -> None:
        """`axis` is the one that ranks divide; None for copies, whose gradients are sums over the ranks' parts of a sequence."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=linear.dtype, device=linear.device))
        mark(self.weight, linear, axis=axis, stride=stride)

    def forward(self) -> torch.Tensor:
        """The weight. Called for it, since megatron-core may gather a parameter until the module that holds it is called."""
        return self.weight


def mark(parameter: torch.nn.Parameter, linear: Linear, *, axis: int | None, stride: int = 1) -> None:
    """megatron-core's attributes: how ranks divide a parameter, and over which of them its gradient is reduced."""
    set_tensor_model_parallel_attributes(parameter, axis is not None, -1 if axis is None else axis, stride)
    parameter.allreduce = linear.allreduce  # type: ignore[attr-defined]
    parameter.sequence_parallel = linear.sequence_parallel and axis is None  # type: ignore[attr-defined]


def make_lora_matrices(linear: Linear, told: LoraSettings, *, rows: int, stride: int = 1) -> tuple[Matrix, Matrix]:
    """A [r, inputs] and B [outputs, r] for `rows` of a layer's outputs on this rank."""
    a = Matrix(linear, told.dim, linear.columns, axis=ROW if linear.axis == ROW else None)
    return a, Matrix(linear, rows, told.dim, axis=COLUMN if linear.axis == COLUMN else None, stride=stride)


@torch.no_grad()
def first_values(a: torch.Tensor, linear: Linear, told: LoraSettings, generator: torch.Generator) -> None:
    """A as it would be on one rank, of which this one takes its columns."""
    ranks = linear.group.size() if linear.axis == ROW else 1
    whole = torch.empty(a.shape[0], linear.columns * ranks)
    if told.a_init == "kaiming":
        torch.nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
    elif told.a_init == "xavier":
        torch.nn.init.xavier_uniform_(whole, generator=generator)
    else:
        torch.nn.init.normal_(whole, std=1 / a.shape[0], generator=generator)
    a.copy_(whole.chunk(ranks, dim=1)[linear.group.rank() if ranks > 1 else 0])


class LoraAdapter(Adapter):
    """Adds s·B·A·x to a layer's output. One A for all that the layer computes."""

    def __init__(self, linear: Linear, told: LoraSettings) -> None:
        super().__init__()
        self.linear, self.group = linear, linear.group
        self.sequence_parallel = linear.sequence_parallel  # generation turns off what is called so
        self.told, self.scale, self.dropout = told, told.scale, told.dropout
        self.make_matrices()

    def make_matrices(self) -> None:
        """The parameters, without values."""
        self.linear_in, self.linear_out = make_lora_matrices(
            self.linear, self.told, rows=self.linear.rows, stride=2 if self.linear.gated else 1
        )

    def reset_parameters(self, generator: torch.Generator) -> None:
        """A random, B zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("linear_in.weight"):
                first_values(parameter, self.linear, self.told, generator)
            elif name.endswith("linear_out.weight"):
                torch.nn.init.zeros_(parameter)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, such that one product of each is the whole adapter."""
        return self.linear_in(), self.linear_out()

    def forward(self, output: torch.Tensor, layer_input: torch.Tensor) -> torch.Tensor:
        """The layer's output with s·B·A·x added."""
        a, b = self._with_gradients(*self.matrices())
        hidden = torch.nn.functional.linear(self._dropped(layer_input), a)
        scaled = hidden if self.scale == 1 else hidden * self.scale
        return FusedAdd.apply(output, self._exchanged(scaled), b)

    def _with_gradients(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """An expert that ranks divide gets its input, and gives its output, in parts that are summed elsewhere; so the matrix
        that they have copies of gets its gradient in parts."""
        if not (self.linear.expert and self.linear.divided):
            return a, b
        if self.linear.axis == COLUMN:
            return tensor_parallel.copy_to_tensor_model_parallel_region(a, group=self.group), b
        return a, tensor_parallel.copy_to_tensor_model_parallel_region(b, group=self.group)

    def _exchanged(self, hidden: torch.Tensor) -> torch.Tensor:
        """A·x [..., r] as B is to be multiplied with it. Its gradient is summed where each rank has rows of B."""
        if self.linear.expert or not self.linear.divided:
            return hidden
        if self.linear.axis == COLUMN:
            gathered = tensor_parallel.gather_from_sequence_parallel_region
            spread = gathered if self.sequence_parallel else tensor_parallel.copy_to_tensor_model_parallel_region
        else:
            scattered = tensor_parallel.reduce_scatter_to_sequence_parallel_region
            spread = scattered if self.sequence_parallel else tensor_parallel.reduce_from_tensor_model_parallel_region
        return spread(hidden, group=self.group)

    def _dropped(self, layer_input: torch.Tensor) -> torch.Tensor:
        """Ranks with the same input drop the same of it; ranks with parts of it, each its own."""
        if not self.dropout or not self.training:
            return layer_input
        parts = self.linear.expert or (self.linear.divided and (self.linear.axis == ROW or self.sequence_parallel))
        name = [get_expert_parallel_rng_tracker_name()] if self.linear.expert else []
        with tensor_parallel.get_cuda_rng_tracker().fork(*name) if parts else nullcontext():
            return torch.nn.functional.dropout(layer_input, self.dropout)
