"""Cohere 2 with experts: parallel branches, layers that slide and layers without positions; the first layers may be dense."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from converter.config import Config, Field, count, counts, field, fixed, number, value
from converter.config_experts import with_experts
from converter.config_layers import FULL, SLIDING, all_full, layer_types, layers_of, marks, no_rope, one_full_in, window_pattern
from converter.config_parts import dropouts, multipliers, only, routed, sizes
from converter.config_rope import rope
from converter.config_router import kinds_of_layers
from converter.families import cohere, llama, mixtral
from converter.model import Model
from converter.rules import Indices
from formats.errors import UserError, format_untrusted

MODELS = "Command A with experts"
ARCHITECTURE = "Cohere2MoeForCausalLM"


def _layer_norm(model: Model, _indices: Indices) -> bool:
    return model.has_norm_bias


def _shared(model: Model, indices: Indices) -> bool:
    return model.shared_ffn > 0 and mixtral.is_sparse(model, indices)


SHARED = tuple(replace(rule, when=_shared) for rule in mixtral.shared())
BIASES = tuple(replace(rule, when=_layer_norm) for rule in (cohere.ONE_NORM[1], cohere.FINAL_BIAS))
RULES = (
    *llama.decoder(
        cohere.ONE_NORM[0],
        BIASES[0],
        *llama.ATTENTION[1:],
        *mixtral.mixed(llama.MLP[1:], mixtral.moe()[1:]),
        *SHARED,
    ),
    BIASES[1],
)


def _read_norm(config: Config) -> dict[str, Any]:
    name = "layer_norm_eps" if config.get("rms_norm_eps") is None else "rms_norm_eps"
    kind = "LayerNorm" if name == "layer_norm_eps" else "RMSNorm"
    return {"normalization": kind, "layernorm_epsilon": number(name, config.get(name, 1e-5))}


def _write_norm(config: Config) -> dict[str, Any]:
    epsilon = number("layernorm_epsilon", config.get("layernorm_epsilon", 1e-5))
    if config.get("normalization") == "RMSNorm":
        return {"rms_norm_eps": epsilon}
    return {"rms_norm_eps": None, "layer_norm_eps": epsilon}


NORM = Field(_read_norm, _write_norm, lambda sizes: {"has_norm_bias": sizes.megatron["normalization"] == "LayerNorm"})

_SPARSE, _DENSE = "intermediate_size", "prefix_dense_intermediate_size"


def _read_ffn(config: Config) -> dict[str, Any]:
    sparse = count(config, _SPARSE)
    return {"ffn_hidden_size": count(config, _DENSE) if config.get(_DENSE) else sparse, "moe_ffn_hidden_size": sparse}


def _write_ffn(config: Config) -> dict[str, Any]:
    sparse, dense = count(config, "moe_ffn_hidden_size"), count(config, "ffn_hidden_size")
    return {_SPARSE: sparse, _DENSE: None if all(with_experts(config)) and dense == sparse else dense}


_KINDS = kinds_of_layers(0)


def _sparse(config: Config) -> list[bool]:
    return with_experts({**_KINDS.to_megatron(config), "num_layers": layers_of(config)})


def _types(config: Config) -> list[str]:
    """Return the types of layers, of which the first dense ones have a pattern of their own."""
    first = config.get("first_k_dense_replace", 0)
    rest = one_full_in(4)(config)
    each = count({"prefix_dense_sliding_window_pattern": config.get("prefix_dense_sliding_window_pattern", 1)}, _PATTERN)
    prefix = [FULL if (layer + 1) % each == 0 else SLIDING for layer in range(number("first_k_dense_replace", first))]
    return [*prefix, *rest][: len(rest)]


_PATTERN = "prefix_dense_sliding_window_pattern"


def _with_types(config: Config) -> Config:
    """Return a configuration whose `layer_types` says what the layers are, whatever they follow from."""
    types = _types(config) if config.get("layer_types") is None else config["layer_types"]
    return {**{name: value for name, value in config.items() if name != "sliding_window_pattern"}, "layer_types": types}


_WINDOW = window_pattern(all_full, default=4096)


def _without_rope(config: Config) -> list[bool]:
    """Layers that see everything have no positions, but for dense ones where `prefix_dense_sliding_window_pattern` is 1."""
    forced = config.get(_PATTERN, 1) == 1
    types = layer_types(_with_types(config), all_full)
    return [word == FULL and (sparse or not forced) for word, sparse in zip(types, _sparse(config), strict=True)]


def _write_pattern(config: Config) -> dict[str, Any]:
    _, without = marks(config, "no_rope_freq", absent=0)
    return {
        _PATTERN: 2 if any(none and not is_sparse for none, is_sparse in zip(without, with_experts(config), strict=True)) else 1
    }


NO_ROPE = Field(no_rope(_without_rope).to_megatron, _write_pattern)

_FFN, _AVERAGE, _COMBINED = "moe_shared_expert_intermediate_size", "average", "shared_expert_combination_strategy"


def _read_shared(config: Config) -> dict[str, Any]:
    shared, combined = number("num_shared_experts", config.get("num_shared_experts", 0)), config.get(_COMBINED, _AVERAGE)
    if combined not in (_AVERAGE, "sum"):
        raise UserError(f"`{_COMBINED}` is `{format_untrusted(combined)}`", hint=f"it may be {_AVERAGE} or sum")
    if not shared:
        return {_FFN: None, "moe_output_multiplier": 1.0}
    return {_FFN: shared * count(config, _SPARSE), "moe_output_multiplier": 0.5 if combined == _AVERAGE else 1.0}


def _write_shared(config: Config) -> dict[str, Any]:
    if not config.get(_FFN):
        return {"num_shared_experts": 0}
    average = config.get("moe_output_multiplier", 1.0) != 1.0
    return {
        "num_shared_experts": count(config, _FFN) // count(config, "moe_ffn_hidden_size"),
        _COMBINED: _AVERAGE if average else "sum",
    }


_SCORES = "moe_router_score_function"


def _read_scores(config: Config) -> dict[str, Any]:
    kind = config.get("expert_selection_fn", "softmax")
    if kind not in ("softmax", "sigmoid"):
        raise UserError(f"`expert_selection_fn` is `{format_untrusted(kind)}`", hint="it may be softmax or sigmoid")
    sums = config.get("norm_topk_prob", True) and config.get("num_experts_per_tok") != 1  # as megatron-core has them of sigmoids
    return {_SCORES: kind, "norm_topk_prob": None if sums or kind == "softmax" else bool(config.get("norm_topk_prob", True))}


def _write_scores(config: Config) -> dict[str, Any]:
    normalized = config.get("norm_topk_prob")
    return {
        "expert_selection_fn": config.get(_SCORES, "softmax"),
        **({} if normalized is None else {"norm_topk_prob": normalized}),
    }


EXPERTS: Sequence[Field] = (
    *routed(experts="num_experts", topk="num_experts_per_tok", ffn=_SPARSE),
    Field(_read_ffn, _write_ffn),
    counts(ffn="ffn_hidden_size"),
    _KINDS,
    Field(_read_shared, _write_shared, lambda sizes: {"shared_ffn": sizes.megatron[_FFN] or 0}),
    Field(_read_scores, _write_scores),
    fixed(
        moe_router_enable_expert_bias=False,
        moe_router_pre_softmax=False,
        moe_router_topk_scaling_factor=None,
        moe_router_num_groups=None,
        moe_apply_probs_on_input=False,
    ),
)
CONFIG = (
    *sizes(head_dim_default=128, positions_default=8192, tied=True),
    *dropouts(),
    NORM,
    *mixtral.GATED,
    llama.PLAIN_ATTENTION,
    *llama.NO_BIAS,
    fixed(parallel_residual="one_norm", rotary_interleaved=True),
    rope("default"),
    Field(lambda config: _WINDOW.to_megatron(_with_types(config)), _WINDOW.to_huggingface),
    NO_ROPE,
    *multipliers(logits=field("mup_output_mult", "logit_scale", default=value(0.0625))),
    *EXPERTS,
    only(attention_bias=False),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "num_shared_experts": 2,
    "first_k_dense_replace": 1, "prefix_dense_intermediate_size": 80, "logit_scale": 0.25, "sliding_window_pattern": 2,
}  # fmt: skip
PROVIDER = ("parallel_residual", "moe_output_multiplier")
