"""megatron-core's local attention, which the CPU uses, for values of another size than the keys: MLA."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention

from trainer.layers.spec import attention_parts


class MLACoreAttention(DotProductAttention):
    """Attention over values of `v_channels`. Keys have `k_channels`; MLA itself gives the scale of the scores."""

    def __init__(self, *args: Any, k_channels: int, v_channels: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden_size_per_attention_head = k_channels
        self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


def local_attention(provider: Any, layer: Any) -> None:
    """Give a local layer with MLA the attention that takes its sizes."""
    parts = attention_parts(layer)
    if provider.multi_latent_attention and parts.core_attention is DotProductAttention:
        parts.core_attention = MLACoreAttention
