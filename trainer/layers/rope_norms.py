"""L2 norms of query and key in layers with rotary embeddings alone; megatron-core has them in all layers (Llama 4)."""

from __future__ import annotations

from typing import Any

from trainer.layers.spec import attention_layers


def rope_norms(provider: Any, model: Any) -> None:
    """Take the L2 norms of query and key from layers without rotary embeddings. They have no weights."""
    without = provider.no_rope_freq
    if not (provider.qk_l2_norm and provider.qk_l2_norm_with_rope and without):
        return
    for layer in attention_layers(model):
        if without[layer.layer_number - 1]:
            layer.self_attention.q_layernorm = layer.self_attention.k_layernorm = None
