"""Granite 4: Granite's multipliers; Mamba-2 layers and attention, or attention alone, with positions or without; experts and one
that every token goes through, or that one alone. Each layer is two of Megatron's."""

from typing import Any

from converter.config import Config, Field, field, fixed, value
from converter.config import counts as sizes_by_name
from converter.config_experts import SOFTMAX, auxiliary_loss
from converter.config_layers import layers_of
from converter.config_mamba import (
    ATTENTION,
    DENSE,
    MAMBA,
    SPARSE,
    WORDS,
    doubled,
    if_any,
    letters,
    mixer,
    pattern,
    spelled,
)
from converter.config_parts import dropouts, only, rms_norm, routed, sizes
from converter.config_rope import rope
from converter.families import bamba, granite, granitemoe, llama, mamba2, mixtral
from converter.hybrid import PATTERN
from converter.rules import gated_mlp, row_parallel
from formats.errors import UserError, format_untrusted

MODELS = "Granite 4.0 Micro, Tiny and Small, H or not"
ARCHITECTURE = "GraniteMoeHybridForCausalLM"

_SHARED = ("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight")
FEEDING = (
    llama.MLP[0],
    gated_mlp("mlp.linear_fc1.weight", _SHARED[0], "ffn", "hidden"),
    row_parallel("mlp.linear_fc2.weight", _SHARED[1], "hidden", "ffn"),
)
RULES = bamba.decoder(
    *bamba.mixers(MAMBA, mamba2.mixing("input_layernorm.weight", "mamba")),
    *bamba.mixers(ATTENTION, llama.ATTENTION),
    *bamba.feeding(DENSE, FEEDING),
    *bamba.feeding(SPARSE, (*granitemoe.EXPERTS, *mixtral.shared(*_SHARED))),
    norm="model.norm.weight",
)

_TYPES, _EXPERTS = "layer_types", "num_local_experts"
_MIXERS = {word: letter for word, letter in WORDS.items() if letter in (MAMBA, ATTENTION)}


def _has_experts(config: Config) -> bool:
    return config.get(_EXPERTS, 8) != 0


def _kinds(config: Config) -> str:
    layers, listed = layers_of(config), config.get(_TYPES)
    mixing = MAMBA * layers if listed is None else letters(_TYPES, listed, _MIXERS)
    if len(mixing) != layers:
        raise UserError(f"`{_TYPES}` has {len(mixing)} layers, and `num_hidden_layers` is {layers}")
    return "".join(letter + (SPARSE if _has_experts(config) else DENSE) for letter in mixing)


def _written_kinds(pattern: str) -> dict[str, Any]:
    mixing = pattern[::2]
    if len(set(pattern[1::2])) != 1 or set(mixing) - {ATTENTION, MAMBA} or set(pattern[1::2]) - {SPARSE, DENSE}:
        raise UserError(
            f"`{PATTERN}` is `{format_untrusted(pattern)}`: each layer of this family is a mixer, and `E` or `-` in all"
        )
    return {_TYPES: spelled(mixing)}


_POSITIONS, _ROPE = "position_embedding_type", rope("default", "linear")


def _read_positions(config: Config) -> dict[str, Any]:
    if config.get(_POSITIONS) == "rope":
        return _ROPE.to_megatron(config)
    if config.get(_POSITIONS) not in (None, "nope"):
        raise UserError(f"`{_POSITIONS}` is `{format_untrusted(config[_POSITIONS])}`; this family has `rope` or `nope`")
    return {_POSITIONS: "none"}


def _written_positions(config: Config) -> dict[str, Any]:
    if config.get(_POSITIONS) == "none":
        return {_POSITIONS: "nope"}
    return {_POSITIONS: "rope", **_ROPE.to_huggingface(config)}


_FFN, _MEGATRON = "shared_intermediate_size", "moe_shared_expert_intermediate_size"
ROUTED = (
    *routed(experts=_EXPERTS, topk="num_experts_per_tok", ffn="intermediate_size"),
    field(_MEGATRON, _FFN, default=value(1024)),
    sizes_by_name(shared_ffn=_MEGATRON),
    fixed(moe_router_pre_softmax=False),
    SOFTMAX,
    auxiliary_loss(),
)
CONFIG = (
    doubled(*sizes(ffn=_FFN, ffn_default=value(1024))),
    *pattern(_kinds, _written_kinds),
    *dropouts(),
    *rms_norm(),
    *mixtral.GATED,
    *bamba.MAMBA_SIZES,
    *mixer(_kinds, norm="rms_norm_eps", default=1e-6, projection=("mamba_proj_bias",), convolution="mamba_conv_bias"),
    bamba.NO_BIAS,
    only(attention_bias=False),
    Field(_read_positions, _written_positions),
    *granite.MULTIPLIERS,
    if_any(ROUTED, _has_experts, lambda megatron: bool(megatron.get("num_moe_experts")), {"num_moe_experts": None},
           {_EXPERTS: 0, "num_experts_per_tok": 0}),
)  # fmt: skip
LAYOUTS = ("hybrid",)
SMALL = {
    **bamba.SMALL, **granite.SMALL, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4,
    "num_experts_per_tok": 2, "shared_intermediate_size": 80, "position_embedding_type": "nope",
}  # fmt: skip
PROVIDER = ("residual_multiplier", *mamba2.PROVIDER)
