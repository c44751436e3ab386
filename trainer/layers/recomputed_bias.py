"""Feed-forward parts with biases that are computed again in the backward pass (`recompute_modules` with `mlp`).

megatron-core's layer adds the last bias itself, so its checkpointed function returns the parameter. Autograd then takes the
parameter for a result of that function, whose backward pass calls itself without end.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.layers.spec import mlp_layers


def recomputed_bias(provider: Any, model: Any) -> None:
    """Let feed-forward parts return a copy of their bias where the provider has it computed again."""
    if provider.recompute_granularity != "selective" or "mlp" not in (provider.recompute_modules or ()):
        return
    for layer in mlp_layers(model):
        layer.mlp.register_forward_hook(_copied)


def _copied(
    _module: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    hidden, bias = output
    return hidden, None if bias is None else bias.clone()
