"""Gated delta nets (https://arxiv.org/abs/2412.06464): layers that mix tokens by a state of a fixed size, instead of the
attention of some layers, in Qwen3-Next and Qwen3.5.

megatron-core has specs of such models for Transformer Engine's layers alone. Their layers of attention are as in its other
specs, so here the spec of a layer of either kind gets a delta net instead of its attention.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_gated_delta_net_module_spec
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules, common
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from formats.errors import UserError
from trainer.layers.pattern import GATED_DELTA_NET, layers_with_delta_nets
from trainer.layers.spec import backend_of, is_local

NOT_WITH = {
    "multi_latent_attention": False, "parallel_residual": None, "pre_layernorms": True, "post_layernorms": False,
    "attention_output_bias": False, "qk_layernorm_after_rope": False, "qk_l2_norm_with_rope": False,
}  # fmt: skip
"""Fields that change attention in ways that a model with delta nets has not, with the values that leave it as it is."""


def attention_alone(provider: Any) -> Any:
    """Return the provider of the same model with usual attention in all layers, for megatron-core's specs of layers."""
    if provider.experimental_attention_variant is None:
        return provider
    plain = copy(provider)
    plain.experimental_attention_variant = None
    return plain


def delta_nets(provider: Any, spec: Any, vp_stage: int | None) -> Any:
    """Return the spec of this rank's layers with a gated delta net where `provider.linear_attention_freq` says so."""
    if provider.experimental_attention_variant != GATED_DELTA_NET:
        return spec
    nets = {id(layer): with_net(provider, layer) for layer in spec.layer_specs}
    is_linear = layers_with_delta_nets(provider)
    numbered = zip(_numbers(provider, vp_stage), spec.layer_specs, strict=True)
    return replace(spec, layer_specs=[nets[id(layer)] if is_linear[number] else layer for number, layer in numbered])


def _numbers(provider: Any, vp_stage: int | None) -> list[int]:
    """Return the numbers of this rank's layers."""
    layout = provider.pipeline_model_parallel_layout
    if layout is not None:
        return list(layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage))
    first = get_transformer_layer_offset(provider, vp_stage=vp_stage)
    return list(range(first, first + get_num_layers_to_build(provider, vp_stage=vp_stage)))


def with_net(provider: Any, layer: Any) -> Any:
    """Return the spec of a layer with a gated delta net instead of attention. Raises UserError on a GPU without its kernels."""
    if not common.HAVE_FLA:
        raise UserError(
            "gated delta nets need flash-linear-attention on a GPU, which is not installed",
            hint="`pip install flash-linear-attention`",
        )
    parts = layer.submodules
    if not is_local(layer):
        net = get_gated_delta_net_module_spec(provider, backend_of(layer))
        return replace(layer, submodules=replace(parts, self_attention=net, input_layernorm=IdentityOp))
    modules = GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=WrappedTorchNorm, out_proj=RowParallelLinear)
    keys = {**parts.sharded_state_dict_keys_map, "input_layernorm.": "self_attention.in_proj.layer_norm_"}
    net = ModuleSpec(module=GatedDeltaNet, submodules=modules)
    return replace(layer, submodules=replace(parts, self_attention=net, sharded_state_dict_keys_map=keys))


def net_norm_gradients(provider: Any, model: Any) -> None:
    """Sum the gradients of a delta net's norm over tensor-parallel ranks, each of which has the part of its own heads:
    megatron-core does so with sequence parallelism alone."""
    if provider.tensor_model_parallel_size == 1 or provider.sequence_parallel:
        return
    for layer in model.decoder.layers:
        net = getattr(layer, "self_attention", None)
        if isinstance(net, GatedDeltaNet):
            for parameter in net.out_norm.parameters():
                parameter.register_hook(_summed)


def _summed(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    torch.distributed.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    return gradient
