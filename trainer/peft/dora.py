"""DoRA: LoRA with a trained magnitude m for each row of W + s·B·A (arXiv:2402.09353).

The output is m ∘ (W + s·B·A)·x / ‖W + s·B·A‖, row by row; the norm has no gradient, as in section 4.3 of the paper. The norm is
computed without forming the sum: ‖W‖² + 2s·Σ(W·Aᵀ ∘ B) + s²·Σ(B·A·Aᵀ ∘ B).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

from formats.errors import UserError
from trainer.peft.canonical import CanonicalAdapter
from trainer.peft.fused_layers import FusedParts
from trainer.peft.linear import COLUMN, ROW, Linear
from trainer.peft.lora import LoRA
from trainer.peft.lora_layers import LoraAdapter, set_parallel_attributes


@dataclass(kw_only=True)
class DoRA(LoRA):
    """LoRA with a magnitude for each output, initialized with the norm of the weight's row."""

    def make_adapter(self, module: torch.nn.Module, linear: Linear) -> LoraAdapter:
        """Return an adapter with a magnitude for the whole layer."""
        _refuse_without_equivalent(linear)
        return DoraAdapter(linear, self, base=module)

    def make_canonical(
        self, module: torch.nn.Module, linear: Linear, parts: FusedParts, chosen: Collection[str]
    ) -> CanonicalAdapter:
        """Return an adapter with matrices and a magnitude for each chosen part of a fused layer."""
        _refuse_without_equivalent(linear)
        return CanonicalDoraAdapter(linear, self, base=module, parts=parts, chosen=chosen)


def _refuse_without_equivalent(linear: Linear) -> None:
    """Raise UserError for layers on which PEFT has LoRA alone (`ParamWrapper` in its `tuners/lora/layer.py`)."""
    if linear.grouped or linear.is_router:
        obstacle = "is a router" if linear.is_router else "computes several experts at once"
        raise UserError(
            f"`{linear.name}` {obstacle}, to which no DoRA can be added",
            hint="use `peft=lora`, or leave it out: `peft.exclude_modules=['*.experts.*','*.router']`",
        )


def _magnitude(linear: Linear, rows: int, *, stride: int = 1) -> torch.nn.Parameter:
    magnitude = torch.nn.Parameter(torch.empty(rows, dtype=linear.dtype, device=linear.device))
    set_parallel_attributes(magnitude, linear, axis=COLUMN if linear.axis == COLUMN else None, stride=stride)
    return magnitude


class DoraAdapter(LoraAdapter):
    """A LoRA adapter with a magnitude for each output of the layer."""

    def __init__(self, linear: Linear, settings: LoRA, *, base: torch.nn.Module, **options: Any) -> None:
        self._squares: torch.Tensor | None = None
        super().__init__(linear, settings, **options)
        self._base = (base,)  # in a tuple, so that torch does not register the layer as a submodule of its adapter
        base.register_load_state_dict_post_hook(self._clear_cache)

    def _clear_cache(self, *_: Any) -> None:
        self._squares = None

    def make_matrices(self) -> None:
        """Create A, B and the magnitude."""
        super().make_matrices()
        self.weight_magnitude = _magnitude(self.linear, self.linear.rows, stride=2 if self.linear.gated else 1)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize the parameters so that the layer's output is unchanged."""
        super().reset_parameters(generator)
        self._clear_cache()
        self._set_magnitudes(self.norms(*self.matrices()))
        self._clear_cache()

    def _set_magnitudes(self, norms: torch.Tensor) -> None:
        self.weight_magnitude.copy_(norms)

    def factors(self, norms: torch.Tensor) -> torch.Tensor:
        """Return magnitude / norm of each output [rows]."""
        return self._sum_gradient(self.weight_magnitude) / norms

    def _sum_gradient(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Sum the gradient over ranks for a row-parallel expert, whose ranks each have a partial sum of the output."""
        if self.linear.expert and self.linear.is_sharded and self.linear.axis == ROW:
            return tensor_parallel.copy_to_tensor_model_parallel_region(magnitude, group=self.group)
        return magnitude

    @torch.no_grad()
    def norms(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the norm of each row of W + s·B·A [rows], in the magnitude's dtype, so that the ratio is 1 while B is zero."""
        weight, s = self._weight(), self.scale
        if self._squares is None:
            self._squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        a32, b32 = a.float(), b.float()
        cross = (weight @ a.t()).float() * 2 + s * (b32 @ (a32 @ a32.t()))
        squares = self._squares + s * (cross * b32).sum(dim=1)
        if self.linear.is_sharded and self.linear.axis == ROW:
            dist.all_reduce(squares, group=self.group)
        return squares.clamp_(min=0).sqrt_().to(a.dtype)

    def _weight(self) -> torch.Tensor:
        weight: Any = self._base[0].weight
        return dequantize_fp8_tensor(weight) if is_float8tensor(weight) else weight

    def forward(self, output: torch.Tensor, layer_input: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with s·B·A·x added, scaled row by row; a bias in it is not scaled."""
        factors = self.factors(self.norms(*self.matrices()))
        total = super().forward(output, layer_input)
        bias = self._added_bias()
        return total * factors if bias is None else torch.addcmul(bias - bias * factors, total, factors)

    def _added_bias(self) -> torch.Tensor | None:
        base: Any = self._base[0]
        returned = getattr(base, "skip_bias_add", False) or getattr(base, "te_return_bias", False)
        bias = getattr(base, "bias", None)
        return None if returned or bias is None or not bias.numel() else bias


class CanonicalDoraAdapter(DoraAdapter, CanonicalAdapter):
    """A DoRA adapter with matrices and a magnitude for each chosen part of a fused layer."""

    def make_matrices(self) -> None:
        """Create A, B and the magnitude of each chosen part."""
        CanonicalAdapter.make_matrices(self)
        for part, pair in zip(self.parts.sizes, self.pairs(), strict=True):
            if pair:
                pair.weight_magnitude = _magnitude(self.linear, self.parts.rows(part))

    def _set_magnitudes(self, norms: torch.Tensor) -> None:
        for pair, norm in zip(self.pairs(), self.parts.split(norms), strict=True):
            if pair:
                pair.weight_magnitude.copy_(norm)

    def factors(self, norms: torch.Tensor) -> torch.Tensor:
        """Return magnitude / norm of each output [rows]; 1 for parts without an adapter."""
        paired = zip(self.pairs(), self.parts.split(norms), strict=True)
        return self.parts.interleave(
            [self._sum_gradient(pair.weight_magnitude) / norm if pair else torch.ones_like(norm) for pair, norm in paired]
        )
