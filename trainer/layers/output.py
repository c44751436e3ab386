"""What is done to logits: a bias of the output layer, and a cap."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes


def output_bias(provider: Any, model: Any) -> None:
    """Give the output layer a bias, `output_layer.bias`: a number for each row of the padded vocabulary, zero at first, divided
    like the rows. megatron-core's layer adds and saves a bias that it has; GPTModel makes none."""
    if not provider.output_layer_bias or not model.post_process:
        return
    layer = model.output_layer
    layer.bias = torch.nn.Parameter(torch.zeros(layer.output_size_per_partition, dtype=provider.params_dtype))
    set_tensor_model_parallel_attributes(layer.bias, is_parallel=True, dim=0, stride=1)


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return `cap` · tanh(logits / `cap`); the logits themselves without a cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
