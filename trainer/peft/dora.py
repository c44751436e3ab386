"""DoRA: the length of each row of W + s·B·A is trained apart from its direction (arXiv:2402.09353).

Output m ∘ (W + s·B·A)·x / ‖W + s·B·A‖, row by row; the norm takes no gradient, as in the paper's section 4.3. It is found
without the sum: ‖W‖² + 2s·Σ(W·Aᵀ ∘ B) + s²·Σ(B·A·Aᵀ ∘ B).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

from trainer.peft.canonical import CanonicalAdapter
from trainer.peft.fused_layers import FusedParts
from trainer.peft.linear import COLUMN, ROW, Linear
from trainer.peft.lora import LoRA
from trainer.peft.lora_layers import LoraAdapter, mark


@dataclass(kw_only=True)
class DoRA(LoRA):
    """LoRA with a magnitude for each output, which starts as the length of the weight's row."""

    def make_adapter(self, module: torch.nn.Module, linear: Linear) -> LoraAdapter:
        """The adapter with a magnitude."""
        return DoraAdapter(linear, self, base=module)

    def make_canonical(
        self, module: torch.nn.Module, linear: Linear, found: FusedParts, chosen: Collection[str]
    ) -> CanonicalAdapter:
        """One with a magnitude for each chosen part."""
        return CanonicalDoraAdapter(linear, self, base=module, parts=found, chosen=chosen)


def _magnitude(linear: Linear, rows: int, *, stride: int = 1) -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.empty(rows, dtype=linear.dtype, device=linear.device))
    mark(made, linear, axis=COLUMN if linear.axis == COLUMN else None, stride=stride)
    return made


class DoraAdapter(LoraAdapter):
    """One magnitude per row of the layer."""

    def __init__(self, linear: Linear, told: LoRA, *, base: torch.nn.Module, **more: Any) -> None:
        self._squares: torch.Tensor | None = None
        super().__init__(linear, told, **more)
        self._base = (base,)  # in a tuple, so that torch does not take the layer for a part of its own adapter
        base.register_load_state_dict_post_hook(self._forget)

    def _forget(self, *_: Any) -> None:
        self._squares = None

    def make_matrices(self) -> None:
        """A, B and the magnitude."""
        super().make_matrices()
        self.weight_magnitude = _magnitude(self.linear, self.linear.rows, stride=2 if self.linear.gated else 1)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Such that the layer is what it was."""
        super().reset_parameters(generator)
        self._forget()
        self._set_magnitudes(self.norms(*self.matrices()))
        self._forget()

    def _set_magnitudes(self, norms: torch.Tensor) -> None:
        self.weight_magnitude.copy_(norms)

    def factors(self, norms: torch.Tensor) -> torch.Tensor:
        """What each output is multiplied with: magnitude over norm."""
        return self._whole_gradient(self.weight_magnitude) / norms

    def _whole_gradient(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Ranks that divide an expert by its inputs each see a part of the output, and so of the gradient."""
        if self.linear.expert and self.linear.divided and self.linear.axis == ROW:
            return tensor_parallel.copy_to_tensor_model_parallel_region(magnitude, group=self.group)
        return magnitude

    @torch.no_grad()
    def norms(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The length of each row of W + s·B·A, [rows]; in the magnitude's type, so that nothing changes before B does."""
        weight, s = self._weight(), self.scale
        if self._squares is None:
            self._squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        thin, wide = a.float(), b.float()
        mixed = (weight @ a.t()).float() * 2 + s * (wide @ (thin @ thin.t()))
        squares = self._squares + s * (mixed * wide).sum(dim=1)
        if self.linear.divided and self.linear.axis == ROW:
            dist.all_reduce(squares, group=self.group)
        return squares.clamp_(min=0).sqrt_().to(a.dtype)

    def _weight(self) -> torch.Tensor:
        weight: Any = self._base[0].weight
        return dequantize_fp8_tensor(weight) if is_float8tensor(weight) else weight

    def forward(self, output: torch.Tensor, layer_input: torch.Tensor) -> torch.Tensor:
        """The layer's output with s·B·A·x added, scaled row by row; a bias that is in it is left as it is."""
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
    """A magnitude for each part that is chosen; the others stay as they are."""

    def make_matrices(self) -> None:
        """A, B and the magnitude of each part."""
        CanonicalAdapter.make_matrices(self)
        for part, pair in zip(self.parts.sizes, self.pairs(), strict=True):
            if pair:
                pair.weight_magnitude = _magnitude(self.linear, self.parts.rows(part))

    def _set_magnitudes(self, norms: torch.Tensor) -> None:
        for pair, one in zip(self.pairs(), self.parts.apart(norms), strict=True):
            if pair:
                pair.weight_magnitude.copy_(one)

    def factors(self, norms: torch.Tensor) -> torch.Tensor:
        """One for the rows of parts without an adapter."""
        paired = zip(self.pairs(), self.parts.apart(norms), strict=True)
        return self.parts.together(
            [self._whole_gradient(pair.weight_magnitude) / one if pair else torch.ones_like(one) for pair, one in paired]
        )
