"""LoRA on the router of a mixture of experts, whose weight [experts, hidden] is multiplied in the router's own dtype."""

from __future__ import annotations

from abc import ABC

import torch

from trainer.peft.adapter_layer import AdaptedLayer
from trainer.peft.lora_layers import LoraAdapter


class RouterLayer(ABC, AdaptedLayer):
    """The mixin for a router: the adapter changes the logits, from which megatron-core then chooses experts.

    `ABC` comes first, as in megatron-core's Router: Python gives an object no class with another first base. The methods of
    `AdaptedLayer` then come after those of the router, whose `forward` stays.
    """

    def gating(self, layer_input: torch.Tensor) -> torch.Tensor:
        """Return the logits [sequence, micro batch, experts]."""
        return self.adapter(super().gating(layer_input), layer_input)  # type: ignore[misc]


class RouterAdapter(LoraAdapter):
    """Adds s·B·A·x to the logits, in their dtype."""

    layer_mixin = RouterLayer

    def forward(self, output: torch.Tensor, layer_input: torch.Tensor) -> torch.Tensor:
        """Return output + s·B·A·x."""
        a, b = (matrix.to(output.dtype) for matrix in self.matrices())
        hidden = torch.nn.functional.linear(self._apply_dropout(layer_input).to(output.dtype), a)
        return output + torch.nn.functional.linear(hidden * self.scale, b)
