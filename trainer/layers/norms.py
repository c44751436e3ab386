"""The norm over the hidden size that other pieces add, and what megatron-core's local norms, which the CPU uses, refuse:
zero-centred weights, and states divided along the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from trainer.layers.spec import attention_parts, backend


class LocalNorm(torch.nn.Module):
    """RMSNorm or LayerNorm computed in fp32. A zero-centred weight w multiplies by 1 + w, and is saved as w."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.center, self.eps = int(config.layernorm_zero_centered_gamma), eps
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), 1.0 - self.center))
        self.bias = None if config.normalization == "RMSNorm" else torch.nn.Parameter(torch.zeros(hidden_size))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # megatron-core sums its gradient over ranks

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the norm over the last axis."""
        exact, weight = states.float(), self.weight.float() + self.center
        if self.bias is None:
            return torch.nn.functional.rms_norm(exact, weight.shape, weight, self.eps).type_as(states)
        return torch.nn.functional.layer_norm(exact, weight.shape, weight, self.bias.float(), self.eps).type_as(states)


def norm(provider: Any, layer: Any) -> Any:
    """Return the class of a norm over the hidden size for a copied layer's spec."""
    return accepted(provider, backend(layer).layer_norm(rms_norm=provider.normalization == "RMSNorm"))


def accepted(provider: Any, kind: Any) -> Any:
    """Return the class of a norm, or another in place of a local one that refuses the provider's fields."""
    refused = provider.layernorm_zero_centered_gamma or provider.sequence_parallel
    return LocalNorm if kind is WrappedTorchNorm and refused else kind


def local_norms(provider: Any, layer: Any) -> None:
    """Exchange the norms of a local layer where they refuse the provider's fields."""
    for owner in (layer.submodules, attention_parts(layer)):
        for name, kind in vars(owner).items():
            if kind is WrappedTorchNorm:
                setattr(owner, name, accepted(provider, kind))
