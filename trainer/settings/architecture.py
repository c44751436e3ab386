"""Refuse settings with which a model's own pieces (`trainer.layers`) would not be computed exactly, and choose kernels that
compute its functions. A model of the user's own is checked in the fields it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.enums import AttnBackend

from trainer.layers.delta_net import NOT_WITH
from trainer.layers.pattern import GATED_DELTA_NET
from trainer.layers.rope import KINDS, attention_factor
from trainer.layers.sparse_attention import SPARSE
from trainer.layers.xielu import xielu
from trainer.settings.checks import CP, parallel_size
from trainer.settings.rules import Rule, enforce

_ABSENT = SimpleNamespace(
    position_embedding_type="rope", rope_parameters=None, sliding_rope=None, exact_sequence_length=None, rotary_percent=1.0,
    qk_layernorm_after_rope=False, qk_l2_norm_with_rope=False, qk_layernorm=False, parallel_residual=None, pre_layernorms=True,
    post_layernorms=False, attention_output_bias=False, alibi=None, attn_logit_softcapping=None, clip_qkv=None, position_offset=0,
    gated_linear_unit=False, activation_func=None, num_moe_experts=None, fp8_dot_product_attention=False,
    attention_backend=AttnBackend.auto, yarn_rotary_scaling_factor=1.0, yarn_original_max_position_embeddings=None,
    bias_activation_fusion=None, apply_rope_fusion=None, fused_single_qkv_rope=False, window_size=None,
    multi_latent_attention=False, rope_type="yarn", qk_head_dim=1, qk_pos_emb_head_dim=1, v_head_dim=1, moe_grouped_gemm=False,
    add_bias_linear=False, experimental_attention_variant=None, linear_attention_freq=None,
    bias_dropout_fusion=None, activation_func_clamp_value=None, glu_linear_offset=0.0, moe_layer_freq=1,
    dsa_indexer_topk_freq=1, recompute_granularity=None,
    moe_shared_expert_intermediate_size=None, moe_router_group_score=None, moe_router_num_groups=None, moe_router_fusion=False,
)  # fmt: skip
"""What a model has that lacks a field."""


class _Fields:
    """A model's fields; those it lacks have the values that switch a piece off."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name, getattr(_ABSENT, name))


def check(config: Any) -> None:
    """Refuse, by name, what would be computed in another way than the model's."""
    model, length = _Fields(config.model), getattr(config.dataset, "sequence_length", None)
    enforce(_length_rules(model, length))
    enforce(_position_rules(model))
    enforce(_attention_rules(model, context=parallel_size(config.model, CP)))
    enforce(_kernel_rules(model))
    enforce(_router_rules(model))
    enforce(_delta_net_rules(model))
    enforce(_sparse_rules(model))


def _delta_net_rules(model: Any) -> Iterator[Rule]:
    if model.experimental_attention_variant != GATED_DELTA_NET:
        return
    for name, usual in NOT_WITH.items():
        yield (
            getattr(model, name) != usual,
            f"`model.{name}` is `{getattr(model, name)}`, which cannot be done in a model with gated delta nets",
            f"set `model.{name}={usual}`",
        )


def _length_rules(model: Any, length: Any) -> Iterator[Rule]:
    exact = model.exact_sequence_length
    yield (
        isinstance(length, int) and exact is not None and length > exact,
        f"`dataset.sequence_length` is `{length}`, and this model's positions are computed exactly up to `{exact}` tokens",
        f"set `dataset.sequence_length={exact}` or less",
    )


def _position_rules(model: Any) -> Iterator[Rule]:
    kind, allowed = model.position_embedding_type, {"bias_max", "scale"}
    yield (
        (kind == "alibi") != (model.alibi is not None),
        f"`model.position_embedding_type` is `{kind}`, and `model.alibi` is `{model.alibi}`",
        "set both, or neither: `model.alibi={}` has the usual slopes",
    )
    unknown = sorted(set(model.alibi or ()) - allowed)
    yield unknown, f"`model.alibi` has `{'`, `'.join(unknown)}`", f"it may have `{'` and `'.join(sorted(allowed))}`"
    yield (
        model.position_offset and kind != "learned_absolute",
        f"`model.position_offset` is `{model.position_offset}`, and `model.position_embedding_type` is `{kind}`",
        "only learned positions (`learned_absolute`) begin at another number",
    )
    yield (
        kind == "yarn" and model.yarn_original_max_position_embeddings is None,
        "`model.position_embedding_type` is `yarn`, and `model.yarn_original_max_position_embeddings` is `None`",
        "set the length of sequences before the scaling",
    )
    yield (
        kind == "yarn" and model.rotary_percent < 1,
        f"`model.rotary_percent` is `{model.rotary_percent}`, and with `yarn` megatron-core turns whole heads",
        "leave `model.position_embedding_type=yarn` out",
    )
    factor = model.yarn_rotary_scaling_factor
    yield (
        kind != "yarn" and factor != 1,
        f"`model.yarn_rotary_scaling_factor` is `{factor}`, and `model.position_embedding_type` is `{kind}`",
        "set `model.position_embedding_type=yarn`, or leave the factor out",
    )
    yield from _rope_rules(model, kind)


def _rope_rules(model: Any, kind: str) -> Iterator[Rule]:
    for name in ("rope_parameters", "sliding_rope"):
        scaled = (getattr(model, name) or {"rope_type": "default"}).get("rope_type")
        yield scaled not in KINDS, f"`model.{name}` has the `rope_type` `{scaled}`", f"choose one of: {', '.join(KINDS)}"
    yield (
        model.multi_latent_attention and attention_factor(model) != 1.0,
        f"`model.rope_parameters` has the attention factor `{attention_factor(model)}`, which latent attention leaves out",
        "convert the model's weights, and train it elsewhere",
    )
    yield (
        model.sliding_rope and kind not in ("rope", "yarn"),
        f"`model.sliding_rope` is set, and `model.position_embedding_type` is `{kind}`",
        "leave one of them out",
    )
    yield (
        model.sliding_rope and not model.window_size,
        "`model.sliding_rope` is set, and `model.window_size` is not: no layer slides",
        "leave `model.sliding_rope` out",
    )


def _attention_rules(model: Any, *, context: int) -> Iterator[Rule]:
    for name in ("alibi", "attn_logit_softcapping", "sliding_rope"):
        value = getattr(model, name)
        yield (
            value is not None and context > 1,
            f"`model.{name}` is `{value}`, which does not work with context parallelism (`model.{CP}={context}`)",
            f"set `model.{CP}=1`",
        )
    for name in ("alibi", "attn_logit_softcapping"):
        value = getattr(model, name)
        yield (
            value is not None and model.fp8_dot_product_attention,
            f"`model.{name}` is `{value}`, which attention in FP8 (`model.fp8_dot_product_attention`) does not do",
            "leave `model.fp8_dot_product_attention` out",
        )
    for name in ("multi_latent_attention", "experimental_attention_variant", "fused_single_qkv_rope"):
        value = getattr(model, name)
        yield (
            model.clip_qkv is not None and value,
            f"`model.clip_qkv` is `{model.clip_qkv}`, which is not done with `model.{name}={value}`",
            "leave one of them out",
        )
    cap = model.attn_logit_softcapping
    yield (
        cap is not None and model.attention_backend is AttnBackend.fused,
        f"`model.attn_logit_softcapping` is `{cap}`, and `model.attention_backend` is `fused`: cuDNN does not cap scores",
        "set `model.attention_backend=auto`",
    )
    yield (
        model.qk_layernorm_after_rope and not model.qk_layernorm,
        "`model.qk_layernorm_after_rope` is `True`, and `model.qk_layernorm` is `False`: there are no norms of query and key",
        "set `model.qk_layernorm=true`",
    )


def _sparse_rules(model: Any) -> Iterator[Rule]:
    """megatron-core keeps the tokens that one layer chose for the next ones, and computes layers again in another order."""
    variant, latent = model.experimental_attention_variant, model.multi_latent_attention
    yield (
        variant == SPARSE and not latent,
        f"`model.experimental_attention_variant` is `{variant}`, and `model.multi_latent_attention` is `{latent}`",
        "leave it out: sparse attention is one of latent attention",
    )
    step, kind = model.dsa_indexer_topk_freq, model.recompute_granularity
    why = "layers that are computed again may find the tokens that were chosen for another microbatch"
    yield (
        step > 1 and kind is not None,
        f"`model.dsa_indexer_topk_freq` is `{step}`, and `model.recompute_granularity` is `{kind}`: {why}",
        "set `model.recompute_granularity=null`",
    )


def _router_rules(model: Any) -> Iterator[Rule]:
    score = model.moe_router_group_score
    yield (
        score is not None and not model.moe_router_num_groups,
        f"`model.moe_router_group_score` is `{score}`, and `model.moe_router_num_groups` is `{model.moe_router_num_groups}`",
        "set the number of groups, or leave the score out",
    )
    yield (
        score is not None and model.moe_router_fusion,
        f"`model.moe_router_fusion` is `True`, and the fused kernel does not rate groups by their `{score}` best experts",
        "leave `model.moe_router_fusion` out",
    )


def _kernel_rules(model: Any) -> Iterator[Rule]:
    for name, why in other_kernels(model).items():
        yield getattr(model, name) is True, f"`model.{name}` is `True`: {why}", f"leave `model.{name}` out"
    gated = model.gated_linear_unit or model.num_moe_experts is not None
    yield (
        model.activation_func is xielu and gated,
        "`model.activation_func` is `xielu`, which neither gates nor experts have here",
        "set `model.gated_linear_unit=false`, and no experts",
    )


def other_kernels(model: Any) -> dict[str, str]:
    """Return the fused kernels that compute something else than this model does, with the reason."""
    model, reasons = _Fields(model), dict[str, str]()
    if model.activation_func is not None and not _has_fused_activation(model):
        reasons["bias_activation_fusion"] = "the fused kernel computes SwiGLU, or GELU by tanh in place of GELU"
    if model.num_moe_experts and model.add_bias_linear and model.moe_grouped_gemm is not False:
        reasons["bias_dropout_fusion"] = "grouped experts with biases lack it"
    if attention_factor(model) != 1.0:
        reasons["apply_rope_fusion"] = "the fused kernel leaves out the attention factor of `yarn` and `longrope`"
    if model.multi_latent_attention and any(size & (size - 1) for size in _latent_sizes(model)):
        reasons["apply_rope_fusion"] = "with latent attention, the fused kernel computes heads of 2, 4, 8, … channels alone"
    if model.multi_latent_attention and model.rope_type != "yarn":
        reasons["apply_rope_fusion"] = "with latent attention, the fused kernel computes `rope_type=yarn` alone"
    return reasons


def _latent_sizes(model: Any) -> tuple[int, int, int]:
    """Return the channels of each part of a head, of which megatron-core's kernel makes Triton ranges."""
    return model.qk_head_dim, model.qk_pos_emb_head_dim, model.v_head_dim


def _has_fused_activation(model: Any) -> bool:
    """Tell whether megatron-core has a fused kernel that computes a model's activation: SwiGLU, and GPT-OSS's, which
    is clamped, in grouped experts."""
    if model.activation_func is torch.nn.functional.silu:
        return model.gated_linear_unit and model.activation_func_clamp_value is None and not model.glu_linear_offset
    frequency = model.moe_layer_freq
    only_experts = all(frequency) if isinstance(frequency, list) else frequency == 1
    grouped = model.num_moe_experts and only_experts and model.moe_grouped_gemm is not False
    return (
        bool(model.activation_func is quick_gelu and model.gated_linear_unit and grouped)
        and model.moe_shared_expert_intermediate_size is None
    )
