"""Latent attention (MLA): its sizes and keys in megatron-core's local layers, which the CPU uses, and its norms' epsilon."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention

from trainer.layers.spec import attention_parts, mlp_parts


class MLACoreAttention(DotProductAttention):
    """Attention over values of `v_channels`. Keys have `k_channels`; MLA itself gives the scale of the scores."""

    def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if k_channels is not None and v_channels is not None:  # megatron-core's Attention makes one without, and MLA another
            self.hidden_size_per_attention_head = k_channels
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


def local_attention(provider: Any, layer: Any) -> None:
    """Give a local layer with MLA the attention that takes its sizes."""
    parts = attention_parts(layer)
    if provider.multi_latent_attention and parts.core_attention is DotProductAttention:
        parts.core_attention = MLACoreAttention
        layer.submodules.sharded_state_dict_keys_map |= _NORMS
        if hasattr(mlp_parts(layer), "linear_fc1"):
            layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"


_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
"""The keys of norms in checkpoints, which are Transformer Engine's."""


def latent_epsilon(provider: Any, model: Any) -> None:
    """Give the norms between the two projections of latent attention an epsilon of their own."""
    epsilon = getattr(provider, "latent_layernorm_epsilon", None)
    if epsilon is None:
        return
    for layer in model.decoder.layers:
        attention = layer.self_attention
        for norm in (attention.q_layernorm, attention.kv_layernorm, attention.linear_q_up_proj, attention.linear_kv_up_proj):
            if hasattr(norm, "eps"):  # Transformer Engine's are in the projections
                norm.eps = epsilon
