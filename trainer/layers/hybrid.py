"""The spec of a hybrid's layers: those of a GPT layer apart, with every piece that changes them, and Mamba's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from trainer.layers.norms import norm
from trainer.layers.pattern import has_mamba
from trainer.layers.spec import backend, has_experts, uses_transformer_engine
from trainer.layers.state_space import TorchMixer


class Stack(HybridStack):
    """HybridStack whose last norm is of a given class: megatron-core's own is Transformer Engine's on every device."""

    def __init__(self, config: Any, *args: Any, final_norm: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs, post_layer_norm=False)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def stack_spec(provider: Any, gpt_layers: Sequence[Any], net_layer: Any | None) -> ModuleSpec:
    """Return the spec of HybridModel's decoder from those of GPT layers, adapted copies: one with a feed-forward part, one with
    experts, or both; and one with a gated delta net, where the model has some."""
    first = gpt_layers[0]
    feed_forward = {"moe_layer" if has_experts(layer) else "mlp_layer": _feed_forward(layer) for layer in gpt_layers}
    attention = {"mla_layer" if provider.multi_latent_attention else "attention_layer": _attention(first)}
    mamba = {"mamba_layer": _mamba(provider, first)} if has_mamba(provider) else {}
    net = {"gdn_layer": _attention(net_layer)} if net_layer is not None else {}
    layers = HybridStackSubmodules(**attention, **feed_forward, **mamba, **net)
    return ModuleSpec(module=Stack, submodules=layers, params={"final_norm": norm(provider, first)})


def _attention(layer: Any) -> ModuleSpec:
    parts = layer.submodules
    return replace(
        layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.input_layernorm,
            self_attention=parts.self_attention,
            self_attn_bda=parts.self_attn_bda,
            sharded_state_dict_keys_map=parts.sharded_state_dict_keys_map,
        ),
    )


def _feed_forward(layer: Any) -> ModuleSpec:
    parts = layer.submodules
    return replace(
        layer,
        module=layer.module if has_experts(layer) else MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=parts.pre_mlp_layernorm,
            mlp=parts.mlp,
            mlp_bda=parts.mlp_bda,
            sharded_state_dict_keys_map=parts.sharded_state_dict_keys_map,
        ),
    )


def _mamba(provider: Any, layer: Any) -> ModuleSpec:
    """Return the spec of a Mamba layer from the modules and the residual connection of a GPT layer."""
    modules, in_torch = backend(layer), not kernels_are_there(layer)
    parts = MambaLayerSubmodules(mamba_bda=layer.submodules.self_attn_bda)
    if uses_transformer_engine(layer):
        projection = modules.column_parallel_layer_norm_linear()
    else:
        projection, parts.norm = modules.column_parallel_linear(), norm(provider, layer)
        parts.sharded_state_dict_keys_map = {"norm.": "mixer.in_proj.layer_norm_"}
    linear = MambaMixerSubmodules(in_proj=projection, out_proj=modules.row_parallel_linear())
    parts.mixer = ModuleSpec(module=TorchMixer if in_torch else MambaMixer, submodules=linear)
    return ModuleSpec(module=MambaLayer, submodules=parts)


def mamba_norms(provider: Any, model: Any) -> None:
    """Give the norm after the gate in each Mamba layer an epsilon of its own."""
    if provider.mamba_norm_epsilon is None:
        return
    for layer in model.decoder.layers:
        if isinstance(layer, MambaLayer):
            layer.mixer.norm.eps = provider.mamba_norm_epsilon


def kernels_are_there(layer: Any) -> bool:
    """Tell whether Mamba's CUDA kernels can compute: on a GPU, with mamba_ssm and causal_conv1d."""
    return uses_transformer_engine(layer) and all(find_spec(name) for name in ("mamba_ssm", "causal_conv1d"))
