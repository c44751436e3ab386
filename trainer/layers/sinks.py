"""Attention sinks: a learned score of each head beside those of the tokens (`softmax_type=learnable`)."""

from __future__ import annotations

from typing import Any

from trainer.layers.spec import transformer_layers


def divided_sinks(provider: Any, model: Any) -> None:
    """Mark the sinks of each layer, [heads of this rank], as a part of the model's: megatron-core takes them for copies of rank
    0's, and leaves other ranks' out of the gradient norm."""
    if provider.softmax_type != "learnable":
        return
    for layer in transformer_layers(model):
        sinks = getattr(getattr(layer.self_attention, "core_attention", None), "softmax_offset", None)
        if sinks is not None:
            sinks.tensor_model_parallel, sinks.partition_dim, sinks.partition_stride = True, 0, 1
