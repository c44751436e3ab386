"""The layers of a hybrid, a symbol each as megatron-core's HybridModel takes them, and a provider's numbers counted in them.

A GPT layer is two layers of a hybrid: attention, then feed-forward or experts. Knows no modules.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_linear_attention_pattern
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.utils import is_layer_window_attention

from converter.hybrid import PREDICTION, with_stages

MAMBA, ATTENTION, LATENT_ATTENTION, DELTA_NET, MLP, EXPERTS = "M", "*", "+", "G", "-", "E"

GATED_DELTA_NET = "gated_delta_net"
"""The value of `experimental_attention_variant` of a model with gated delta nets."""


def is_hybrid(provider: Any) -> bool:
    """Tell whether a provider's model is megatron-core's HybridModel."""
    return bool(getattr(provider, "layout", "gpt") == "hybrid")


def layers_of_each(provider: Any) -> int:
    """Return how many layers of the built model are one of a provider's: two of a hybrid that is counted as a GPT model is."""
    return 2 if is_hybrid(provider) and provider.hybrid_layer_pattern is None else 1


def symbols(provider: Any) -> list[str]:
    """Return the symbols of each of a provider's layers: two where it counts attention and feed-forward as one."""
    if provider.hybrid_layer_pattern is not None:
        return list(provider.hybrid_layer_pattern.partition(PREDICTION)[0])
    attention = LATENT_ATTENTION if provider.multi_latent_attention else ATTENTION
    mixers = [DELTA_NET if linear else attention for linear in layers_with_delta_nets(provider)]
    parts = [EXPERTS if has_experts else MLP for has_experts in layers_with_experts(provider)]
    return [mixer + part for mixer, part in zip(mixers, parts, strict=True)]


def has_mamba(provider: Any) -> bool:
    """Tell whether a model has Mamba layers."""
    return MAMBA in (getattr(provider, "hybrid_layer_pattern", None) or "")


def layers_with_delta_nets(provider: Any) -> tuple[bool, ...]:
    """Expand megatron-core's `linear_attention_freq` to one bool per layer."""
    if provider.experimental_attention_variant != GATED_DELTA_NET:
        return (False,) * provider.num_layers
    return tuple(bool(linear) for linear in get_linear_attention_pattern(provider))


def layers_with_experts(provider: Any) -> tuple[bool, ...]:
    """Expand megatron-core's `moe_layer_freq`, every nth layer from the first on or a list, to one bool per layer."""
    if not provider.num_moe_experts:
        return (False,) * provider.num_layers
    frequency = provider.moe_layer_freq
    if isinstance(frequency, int):
        return tuple(layer % frequency == 0 for layer in range(provider.num_layers))
    return tuple(bool(has_experts) for has_experts in frequency)


def pattern(provider: Any) -> str:
    """Return HybridModel's pattern for a finalized provider, with its pipeline stages as GPTModel would have them."""
    layers_per_block = layers_of_each(provider)
    return with_stages("".join(symbols(provider)), [layers_per_block * count for count in _layers_of_stages(provider)])


def _layers_of_stages(provider: Any) -> list[int]:
    """Return the layers of each pipeline stage: all ranks of the first virtual stage, then the second."""
    virtual = provider.virtual_pipeline_model_parallel_size or 1
    ranks_and_stages = [(rank, stage) for stage in range(virtual) for rank in range(provider.pipeline_model_parallel_size)]
    if provider.pipeline_model_parallel_layout is not None:
        layout = provider.pipeline_model_parallel_layout.layout
        return [layout[rank][stage].count(LayerType.decoder) for rank, stage in ranks_and_stages]
    return [get_num_layers_to_build(provider, stage if virtual > 1 else None, rank) for rank, stage in ranks_and_stages]


def in_hybrid_layers(provider: Any) -> Any:
    """Return a copy of a finalized provider whose numbers and lists of layers count those of HybridModel; stages are in the
    pattern alone."""
    counted = copy.copy(provider)
    counted.is_hybrid_model = True
    for name, value in _STAGES_IN_PATTERN.items():
        setattr(counted, name, value)
    if layers_of_each(provider) == 2:
        _double(counted, provider)
    return counted


_STAGES_IN_PATTERN = {
    "pipeline_model_parallel_layout": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}


def _double(counted: Any, provider: Any) -> None:
    """Count each layer of a copied provider as two."""
    window, sliding = provider.window_size, provider.window_attn_skip_freq
    if window is not None and sliding is not None:
        layers = range(1, provider.num_layers + 1)
        counted.window_attn_skip_freq = [int(is_layer_window_attention(window, sliding, layer)) for layer in layers]
    for name in ("num_layers", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "recompute_num_layers"):
        if (value := getattr(provider, name)) is not None:
            setattr(counted, name, 2 * value)
    for name in ("no_rope_freq", "window_attn_skip_freq", "moe_layer_freq", "linear_attention_freq", "cp_comm_type"):
        if isinstance(value := getattr(counted, name), list):
            setattr(counted, name, [item for item in value for _ in range(2)])
