"""A number that the output of a mixture of experts is multiplied by: Cohere's averages chosen and shared experts."""

from __future__ import annotations

from typing import Any

import torch

from trainer.layers.spec import transformer_layers


def expert_output(provider: Any, model: Any) -> None:
    """Multiply what the experts of each layer compute by `provider.moe_output_multiplier`."""
    if provider.moe_output_multiplier == 1.0:
        return
    for layer in transformer_layers(model):
        if layer.is_moe_layer:
            layer.mlp.register_forward_hook(_Multiplied(provider.moe_output_multiplier))


class _Multiplied:
    """A hook of a mixture of experts."""

    def __init__(self, multiplier: float) -> None:
        self.multiplier = multiplier

    def __call__(self, _module: Any, _args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        computed, bias = output  # which is part of it
        return computed * self.multiplier, bias
