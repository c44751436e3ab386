"""LoRA: train two low-rank matrices beside a frozen weight W: W + s·B·A (arXiv:2106.09685).

This is the method and its hyperparameters; the computation is in `lora_layers` and `canonical`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from formats.errors import UserError
from trainer.peft import fused_layers
from trainer.peft.adapter_layer import adapt
from trainer.peft.canonical import CanonicalAdapter
from trainer.peft.grouped import CanonicalGroupedAdapter, GroupedAdapter
from trainer.peft.linear import Linear, describe_linear
from trainer.peft.lora_layers import LoraAdapter
from trainer.peft.peft import PEFT
from trainer.peft.router import RouterAdapter
from trainer.peft.targets import targeted_names


@dataclass(kw_only=True)
class LoRA(PEFT):
    """Low-rank matrices beside linear layers. B is initialized with zeros, so that the model is unchanged at first.

    >>> LoRA(dim=16, alpha=32, target_modules=["linear_qkv"]).scale
    2.0
    """

    dim: int = 32
    """The rank r."""

    alpha: float = 32
    """The product is scaled by alpha / r."""

    dropout: float = 0.0
    """The dropout probability of the adapter's input."""

    canonical: bool = False
    """Separate adapters for query, key, value, gate and up, as in Hugging Face PEFT; these can be targeted as `linear_q`,
    `linear_fc1_up`, …. Otherwise a fused layer has one A and one B."""

    use_rslora: bool = False
    """Scale by alpha / √r instead (arXiv:2312.03732)."""

    lora_plus_ratio: float | None = None
    """The learning rate of B divided by that of A (LoRA+, arXiv:2402.12354); None for the same."""

    a_init: Literal["kaiming", "xavier", "normal"] = "kaiming"
    """The initializer of A: Kaiming's, uniform in ±1/√inputs (PEFT's default); Xavier's, uniform; or normal with deviation
    1/r."""

    def check(self) -> None:
        """Raise UserError for numbers out of range."""
        ranges = {
            "dim": (self.dim >= 1, "at least 1"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and less than 1"),
            "lora_plus_ratio": (self.lora_plus_ratio is None or self.lora_plus_ratio > 0, "more than 0"),
        }
        for name, (is_valid, expected) in ranges.items():
            if not is_valid:
                raise UserError(f"`peft.{name}` is `{getattr(self, name)}`, it should be {expected}")

    @property
    def scale(self) -> float:
        """Return the factor s."""
        return self.alpha / (math.sqrt(self.dim) if self.use_rslora else self.dim)

    def transform(self, module: torch.nn.Module, name: str) -> torch.nn.Module:
        """Add an adapter to a linear layer, and return the layer."""
        linear = describe_linear(module, name)
        names = fused_layers.part_names(name) if self.canonical else {}
        if not names:
            return adapt(module, self.make_adapter(module, linear))
        targeted = targeted_names(name, tuple(names.values()), self.target_modules, self.exclude_modules)
        parts = fused_layers.find_fused_parts(linear, module.config)
        chosen = [part for part, part_name in names.items() if part_name in targeted]
        return adapt(module, self.make_canonical(module, linear, parts, chosen))

    def make_adapter(self, _module: torch.nn.Module, linear: Linear) -> LoraAdapter:
        """Return an adapter for the whole layer."""
        kind = RouterAdapter if linear.is_router else GroupedAdapter if linear.grouped else LoraAdapter
        return kind(linear, self)

    def make_canonical(
        self, _module: torch.nn.Module, linear: Linear, parts: fused_layers.FusedParts, chosen: Collection[str]
    ) -> CanonicalAdapter:
        """Return an adapter with matrices for each chosen part of a fused layer."""
        kind = CanonicalGroupedAdapter if linear.grouped else CanonicalAdapter
        return kind(linear, self, parts=parts, chosen=chosen)

    def aliases(self, name: str) -> Sequence[str]:
        """Return the names of the parts if each has an adapter, else the module's own."""
        return tuple(fused_layers.part_names(name).values()) or (name,) if self.canonical else (name,)

    def rate_multiples(self) -> Mapping[str, float]:
        """Return LoRA+'s multiple for B."""
        return {} if self.lora_plus_ratio is None else {"*.linear_out.weight": self.lora_plus_ratio}
