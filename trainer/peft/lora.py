"""LoRA: beside a frozen weight W, the product of two thin matrices is trained: W + s·B·A (arXiv:2106.09685).

Knows what is told, not how it is computed: that is `pair`'s. Knows no checkpoint and no PEFT.
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
from trainer.peft.linear import Linear, describe
from trainer.peft.lora_layers import LoraAdapter
from trainer.peft.peft import PEFT
from trainer.peft.targets import wanted


@dataclass(kw_only=True)
class LoRA(PEFT):
    """Low-rank matrices beside linear layers; B starts at zero, so that training starts from the model as it is."""

    dim: int = 32
    """The rank r."""

    alpha: float = 32
    """The product is scaled by alpha / r."""

    dropout: float = 0.0
    """Of the adapter's input."""

    canonical: bool = False
    """Adapters for query, key, value, gate and up, as PEFT has them, also by the names `linear_q`, `linear_fc1_up`, …; else
    one A for what megatron-core computes as one."""

    use_rslora: bool = False
    """Scale by alpha / √r instead (arXiv:2312.03732)."""

    lora_plus_ratio: float | None = None
    """The learning rate of B, in those of A (LoRA+, arXiv:2402.12354); None for the same."""

    a_init: Literal["kaiming", "xavier", "normal"] = "kaiming"
    """First values of A: PEFT's default, uniform in ±1/√inputs; Xavier's uniform; or a normal distribution of 1/r."""

    def check(self) -> None:
        """UserError for numbers out of range."""
        ranges = {
            "dim": (self.dim >= 1, "at least 1"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and less than 1"),
            "lora_plus_ratio": (self.lora_plus_ratio is None or self.lora_plus_ratio > 0, "more than 0"),
        }
        for name, (fits, wanted_range) in ranges.items():
            if not fits:
                raise UserError(f"`peft.{name}` is `{getattr(self, name)}`, it should be {wanted_range}")

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.alpha / (math.sqrt(self.dim) if self.use_rslora else self.dim)

    def transform(self, module: torch.nn.Module, name: str) -> torch.nn.Module:
        """The layer, with an adapter in it."""
        linear = describe(module, name)
        names = fused_layers.part_names(name) if self.canonical else {}
        if not names:
            return adapt(module, self.make_adapter(module, linear))
        left = wanted(name, tuple(names.values()), self.target_modules, self.exclude_modules)
        found = fused_layers.find(linear, module.config)
        chosen = [part for part, whole in names.items() if whole in left]
        return adapt(module, self.make_canonical(module, linear, found, chosen))

    def make_adapter(self, _module: torch.nn.Module, linear: Linear) -> LoraAdapter:
        """One for all that a layer computes."""
        return LoraAdapter(linear, self)

    def make_canonical(
        self, _module: torch.nn.Module, linear: Linear, found: fused_layers.FusedParts, chosen: Collection[str]
    ) -> CanonicalAdapter:
        """One for each chosen part of a layer."""
        return CanonicalAdapter(linear, self, parts=found, chosen=chosen)

    def aliases(self, name: str) -> Sequence[str]:
        """Those of the parts, where each has an adapter."""
        return tuple(fused_layers.part_names(name).values()) or (name,) if self.canonical else (name,)

    def rate_multiples(self) -> Mapping[str, float]:
        """LoRA+'s."""
        return {} if self.lora_plus_ratio is None else {"*.linear_out.weight": self.lora_plus_ratio}
