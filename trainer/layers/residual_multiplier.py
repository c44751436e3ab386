"""x + multiplier · f(x) for attention and the feed-forward part. Granite, MiniCPM, HyperCLOVA X."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

Add = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]


def residual_multiplier(provider: Any, layer: Any) -> None:
    """Multiply what both branches add to the residual by `provider.residual_multiplier`."""
    if provider.residual_multiplier != 1.0:
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = _multiplied(provider.residual_multiplier)


def _multiplied(multiplier: float) -> Callable[[bool, bool], Add]:
    """Return megatron-core's sum of bias, dropout and residual, fused or not, over a multiplied branch."""

    def choose(training: bool, fused: bool) -> Add:
        add = get_bias_dropout_add(training, fused)

        def multiply_and_add(
            branch: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
        ) -> torch.Tensor:
            output, bias = branch
            return add((output * multiplier, None if bias is None else bias * multiplier), residual, dropout)

        return multiply_and_add

    return choose
