"""Biases of experts in megatron-core's local layers, which add them in place to a view that autograd lets no one change."""

from __future__ import annotations

from typing import Any

import torch

from trainer.layers.spec import transformer_layers


def expert_biases(provider: Any, model: Any) -> None:
    """Let the last projection of each local expert return a copy of its output, where experts have biases."""
    if not (provider.add_bias_linear and provider.num_moe_experts):
        return
    for layer in transformer_layers(model):
        experts = getattr(layer.mlp, "experts", None)
        for expert in getattr(experts, "local_experts", ()):
            expert.linear_fc2.register_forward_hook(_copied)


def _copied(_module: Any, _args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    computed, bias = output
    return computed.clone(), bias
