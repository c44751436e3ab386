"""DeepSeek's sparse attention (DSA): an indexer chooses the tokens that each token attends to. megatron-core computes it, with
Transformer Engine's projections or, on the CPU, with its local ones and `Replicated`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_dsa_module_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.experimental_attention_variant.dsa import DSAttention

from formats.errors import UserError
from trainer.layers.norms import accepted
from trainer.layers.spec import attention_layers, backend, mlp_parts, uses_transformer_engine

SPARSE = "dsa"


class Replicated(torch.nn.Linear):
    """A projection that each tensor-parallel rank has whole, as Transformer Engine's with `parallel_mode="duplicated"`."""

    def __init__(self, inputs: int, outputs: int, *, config: Any, init_method: Callable[[Any], Any], **_: Any) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=config.params_dtype)
        if config.perform_initialization:
            init_method(self.weight)

    def forward(self, values: torch.Tensor) -> Any:
        """Return the projected values, [sequence, batch, outputs], and no bias."""
        return super().forward(values), None


class Masked(DSAttention):
    """Sparse attention that takes a mask where there is one: the CPU's, of packed rows. megatron-core's takes the causal one."""

    def forward(self, query: torch.Tensor, *args: Any, attention_mask: Any, attn_mask_type: Any = None, **kwargs: Any) -> Any:
        """Return the output of all heads, [sequence, batch, heads · channels]."""
        self.microbatch = attention_mask
        if attention_mask is not None:
            attention_mask, attn_mask_type = attention_mask.expand(query.shape[1], -1, -1, -1), None
        return super().forward(query, *args, attention_mask=attention_mask, attn_mask_type=attn_mask_type, **kwargs)

    def _get_index_share_carrier(self, packed_seq_params: Any, attention_mask: Any) -> Any:
        """Return what holds the tokens that layers before this one chose, which is the same object in all layers."""
        return super()._get_index_share_carrier(packed_seq_params, attention_mask if self.microbatch is None else self.microbatch)


class _Local(LocalSpecProvider):
    """Local modules that take the provider's fields."""

    def __init__(self, provider: Any) -> None:
        self.provider = provider

    def layer_norm(self, **kinds: bool) -> Any:
        """Return the class of a norm."""
        return accepted(self.provider, super().layer_norm(**kinds))

    def linear(self) -> type:
        """Return the class of projections that are not divided."""
        return Replicated


def sparse_attention(provider: Any, layer: Any) -> None:
    """Give a layer with latent attention the indexer, with `experimental_attention_variant=dsa`."""
    if provider.experimental_attention_variant != SPARSE:
        return
    local = not uses_transformer_engine(layer)
    attention = get_dsa_module_spec_for_backend(provider, _Local(provider) if local else backend(layer))
    if local:
        attention.submodules.core_attention.module = Masked
        attention.submodules.linear_q_down_proj = attention.submodules.linear_kv_down_proj = ColumnParallelLinear
        if hasattr(mlp_parts(layer), "linear_fc1"):
            layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    layer.submodules.self_attention = attention


def shared_choices(_provider: Any, model: Any) -> None:
    """Raise UserError where a layer takes over tokens that a layer of another stage chose."""
    by_number = {layer.layer_number: getattr(layer.self_attention, "core_attention", None) for layer in attention_layers(model)}
    for number, attention in by_number.items():
        source = getattr(attention, "source_layer", number)
        if source not in by_number:
            raise UserError(
                f"layer {number} attends to tokens that layer {source} chose, which another pipeline stage has",
                hint="choose `model.pipeline_model_parallel_layout` so that a stage begins with a layer that has an indexer",
            )
