"""Biases of experts, which megatron-core's local layers add in place to a view that autograd lets no one change, and whose
gradients it sums over tensor-parallel ranks once too often.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.layers.spec import transformer_layers


def expert_biases(provider: Any, model: Any) -> None:
    """Let the last projection of each local expert return a copy of its output, and count each gradient once, where experts have
    biases.

    Each tensor-parallel rank then has whole experts (`expert_tensor_parallel_size` 1), and the ranks are data-parallel for them.
    """
    if not (provider.add_bias_linear and provider.num_moe_experts):
        return
    for layer in transformer_layers(model):
        experts = getattr(layer.mlp, "experts", None)
        for parameter in experts.parameters() if experts is not None else ():
            parameter.sequence_parallel = False  # it would be summed over those ranks after the mean over them
        for expert in getattr(experts, "local_experts", ()):
            expert.linear_fc2.register_forward_hook(_copied)


def _copied(_module: Any, _args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    computed, bias = output
    return computed.clone(), bias
