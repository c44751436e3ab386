"""Rotary embeddings that GPTModel's arguments cannot express: scalings with numbers of their own, and other ones on layers that
slide.

GPTModel computes `yarn` itself (`yarn_*`) over whole heads, with one attention factor in all layers. The attention factor
multiplies cosines and sines; megatron-core's attention has it as `_yarn_concentration_factor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_find_correction_range,
    _yarn_get_concentration_factor_from_config,
    _yarn_get_mscale,
    _yarn_linear_ramp_mask,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.utils import is_layer_window_attention

from converter.config import language_model
from converter.config_rope import rope_numbers
from trainer.layers.spec import attention_layers, transformer_layers

Numbers = Mapping[str, Any]


def frequencies(numbers: Numbers, dim: int) -> torch.Tensor:
    """Return the inverse frequencies [dim / 2] of rotary embeddings over `dim` channels, fp32 on the CPU.

    `numbers` are the `rope_parameters` of transformers, and its `ROPE_INIT_FUNCTIONS` the source of the arithmetic. `longrope` is
    computed for sequences up to `original_max_position_embeddings`, `dynamic` for those up to the model's length.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return _SCALED[numbers["rope_type"]](1.0 / numbers["rope_theta"] ** exponents, numbers)


def _linear(plain: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    return plain / numbers["factor"]


def _llama3(plain: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RotaryEmbedding._apply_scaling(None, plain, **{name: numbers[name] for name in names})  # type: ignore[arg-type]


def _longrope(plain: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    return plain / torch.tensor(numbers["short_factor"], dtype=torch.float32, device="cpu")


def _yarn(plain: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    low, high = _yarn_find_correction_range(
        numbers.get("beta_fast") or 32, numbers.get("beta_slow") or 1, 2 * plain.numel(), numbers["rope_theta"],
        numbers["original_max_position_embeddings"], numbers.get("truncate", True),
    )  # fmt: skip
    scaled = _yarn_linear_ramp_mask(low, high, plain.numel(), torch.device("cpu"))
    return plain / numbers["factor"] * scaled + plain * (1 - scaled)


_SCALED: dict[str, Callable[[torch.Tensor, Numbers], torch.Tensor]] = {
    "default": lambda plain, _: plain,
    "dynamic": lambda plain, _: plain,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
KINDS = tuple(_SCALED)
"""Values of `rope_type` in `rope_parameters` and `sliding_rope`."""


def own_factor(numbers: Numbers) -> float:
    """Return the attention factor of `rope_parameters`: of `longrope` and `yarn` the given one, or what follows from how far the
    length was extended; of other kinds 1."""
    kind, attention_factor = numbers["rope_type"], numbers.get("attention_factor")
    if kind not in ("longrope", "yarn"):
        return 1.0
    if attention_factor is not None:
        return float(attention_factor)
    factor = numbers["factor"]
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(numbers["original_max_position_embeddings"])) if factor > 1 else 1.0
    both = numbers.get("mscale"), numbers.get("mscale_all_dim")
    return _yarn_get_mscale(factor, both[0]) / _yarn_get_mscale(factor, both[1]) if all(both) else _yarn_get_mscale(factor)


def attention_factor(provider: Any) -> float:
    """Return what cosines and sines are multiplied by in layers that do not slide: 1 without `yarn` and `longrope`."""
    numbers = getattr(provider, "rope_parameters", None)
    if numbers:
        return own_factor(numbers)
    return _yarn_get_concentration_factor_from_config(provider) if provider.position_embedding_type == "yarn" else 1.0


def hybrid_rope(provider: Any, model: Any) -> None:
    """Give HybridModel the rotary embeddings that GPTModel has arguments for and HybridModel has none: interleaved ones, and
    Llama 3.1's scaling."""
    embedding = getattr(model, "rotary_pos_emb", None)
    if provider.is_hybrid_model and embedding is not None:
        embedding.rotary_interleaved = provider.rotary_interleaved
        if provider.rope_scaling:
            embedding.inv_freq = embedding._apply_scaling(embedding.inv_freq, factor=provider.rope_scaling_factor)


def own_frequencies(provider: Any, model: Any) -> None:
    """Replace the frequencies that GPTModel has no arguments for: `rope_parameters`, and all four numbers of Llama 3.1's scaling,
    of which GPTModel takes the factor and fixes the others."""
    numbers = _own_numbers(provider)
    if numbers is None:
        return
    layers = [layer for layer in transformer_layers(model) if not isinstance(layer.self_attention, IdentityOp)]
    attentions = [layer.self_attention for layer in layers]
    for embedding in (
        [attention_layer.rotary_pos_emb for attention_layer in attentions]
        if provider.multi_latent_attention
        else [model.rotary_pos_emb]
    ):
        embedding.inv_freq = frequencies(numbers, 2 * embedding.inv_freq.numel()).to(embedding.inv_freq.device)
    for attention in attentions:
        attention._yarn_concentration_factor = attention_factor(provider)


def _own_numbers(provider: Any) -> Numbers | None:
    if provider.rope_parameters:
        return {"rope_theta": provider.rotary_base, **provider.rope_parameters}
    if provider.rope_scaling and provider.hf_config:
        numbers = rope_numbers(language_model(provider.hf_config), layers="full_attention")
        # Without numbers of its own, a family's default are those that GPTModel fixes.
        return {**numbers, "rope_theta": provider.rotary_base} if numbers["rope_type"] == "llama3" else None
    return None


def sliding_rope(provider: Any, model: Any) -> None:
    """Give layers whose attention slides the rotary embedding `sliding_rope`, with its attention factor."""
    if provider.sliding_rope is None:
        return
    embedding = RotaryEmbedding(
        provider.kv_channels,
        provider.rotary_percent,
        rotary_interleaved=provider.rotary_interleaved,
        use_cpu_initialization=provider.use_cpu_initialization,
        cp_group=model.pg_collection.cp,
    )
    inverse_frequencies = frequencies(provider.sliding_rope, 2 * embedding.inv_freq.numel())
    embedding.inv_freq = inverse_frequencies.to(embedding.inv_freq.device)
    for layer in attention_layers(model):
        if is_layer_window_attention(provider.window_size, provider.window_attn_skip_freq, layer.layer_number):
            layer.self_attention._yarn_concentration_factor = own_factor(provider.sliding_rope)
            layer.self_attention.register_forward_pre_hook(_Instead(embedding), with_kwargs=True)


class _Instead:
    """A hook of an attention that turns its queries and keys by another embedding, over the same positions."""

    def __init__(self, embedding: RotaryEmbedding) -> None:
        self.embedding = embedding

    def __call__(self, _module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rotary = kwargs.get("rotary_pos_emb")
        return args, kwargs if rotary is None else {**kwargs, "rotary_pos_emb": self.embedding(rotary.shape[0])}
