"""Latent attention (MLA): its sizes and keys in megatron-core's local layers, which the CPU uses, the epsilon of its norms, and
gradients that tensor-parallel ranks share.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from trainer.layers.spec import attention_parts, backend, mlp_parts, transformer_layers


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


class PlainQueries(MLASelfAttention):
    """Latent attention whose queries are projected from all channels, without the norm that megatron-core has before that."""

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        resolver = QKNormConfigResolver(self.config, submodules)
        resolver.has_q_lora = True  # what it then says of queries is not used
        return {**resolver.resolve(), "linear_q_proj": submodules.linear_q_proj}


def plain_queries(provider: Any, layer: Any) -> None:
    """Give a layer whose queries are not projected from a few channels (`q_lora_rank` None) a projection without a norm."""
    if not provider.multi_latent_attention or provider.q_lora_rank is not None:
        return
    parts = attention_parts(layer)
    parts.linear_q_proj, parts.q_layernorm = backend(layer).column_parallel_linear(), IdentityOp
    layer.submodules.self_attention.module = PlainQueries


def latent_epsilon(provider: Any, model: Any) -> None:
    """Give the norms between the two projections of latent attention an epsilon of their own."""
    epsilon = getattr(provider, "latent_layernorm_epsilon", None)
    if epsilon is None:
        return
    for layer in transformer_layers(model):
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            norm = getattr(layer.self_attention, name, None)
            if hasattr(norm, "eps"):  # Transformer Engine's are in the projections
                norm.eps = epsilon


def latent_gradients(provider: Any, model: Any) -> None:
    """Complete two gradients that megatron-core gets wrong at TP > 1: that of the positions of keys, which all heads share, and
    of which each rank has the part of its own heads; and that of the norm of queries, of which each rank has all without sequence
    parallelism, and which is summed over ranks."""
    size = provider.tensor_model_parallel_size
    if not provider.multi_latent_attention or size == 1:
        return
    for layer in transformer_layers(model):
        if isinstance(layer.self_attention, IdentityOp):
            continue
        layer.self_attention.linear_kv_down_proj.register_forward_hook(_Shared(provider))
        norm = getattr(layer.self_attention, "q_layernorm", None)
        for parameter in norm.parameters() if norm is not None and not provider.sequence_parallel else ():
            parameter.register_hook(lambda gradient: gradient / size)


class _Shared:
    """A hook of the projection to latent keys and values: its output has all channels; gradients of positions are summed."""

    def __init__(self, provider: Any) -> None:
        self.provider, self.sizes = provider, [provider.kv_lora_rank, provider.qk_pos_emb_head_dim]

    def __call__(self, _module: Any, _args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        (combined, bias), cut_by_sequence = output, self.provider.sequence_parallel
        if combined.shape[-1] != sum(self.sizes):  # a local layer's, cut by channels
            combined = gather_from_tensor_model_parallel_region(combined)
            combined = scatter_to_sequence_parallel_region(combined) if cut_by_sequence else combined
        if cut_by_sequence:  # megatron-core gathers the positions, and sums their gradients
            return combined, bias
        latent, positions = combined.split(self.sizes, dim=-1)
        return torch.cat([latent, copy_to_tensor_model_parallel_region(positions)], dim=-1), bias
