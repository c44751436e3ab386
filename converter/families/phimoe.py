"""Phi-3.5 MoE: Mixtral with LayerNorm, biases of attention and of logits, and experts chosen by SparseMixer."""

from typing import Any

from converter.config import Config, Field, agreeing, field, fixed, flag, number, object_of, switches, value
from converter.config_experts import auxiliary_loss
from converter.config_layers import window
from converter.config_parts import dropouts, layer_norm, not_computed, routed, sizes, trained_with
from converter.config_rope import rope
from converter.families import llama, mixtral
from converter.families.gpt_neox import normed
from converter.model import Model
from converter.rules import Indices, under, vocab_parallel, with_bias

MODELS = "Phi-3.5 MoE; contexts up to the original length"
ARCHITECTURE = "PhimoeForCausalLM"


def _biased(model: Model, _indices: Indices) -> bool:
    return model.attention_bias


def _head_biased(model: Model, _indices: Indices) -> bool:
    return model.head_bias


LAYER = (
    *normed("self_attention.linear_qkv.layer_norm_", "input_layernorm"),
    *with_bias(llama.ATTENTION[1], when=_biased),
    *with_bias(llama.ATTENTION[2], when=_biased),
    *normed("pre_mlp_layernorm.", "post_attention_layernorm"),
    *mixtral.SPARSE[1:],
)
_EMBEDDING, _NORM, _HEAD = llama.decoder()
RULES = (
    _EMBEDDING,
    *under("decoder.layers.{layer}", "model.layers.{layer}", LAYER),
    *normed("decoder.final_layernorm.", "model.norm"),
    _HEAD,
    vocab_parallel("output_layer.bias", "lm_head.bias", when=_head_biased),
)
_ROPE = rope("default", "longrope", theta=1e6)


def _read_rope(config: Config) -> dict[str, Any]:
    """Read `longrope`, in which sequences up to the original length have `short_mscale` as their attention factor."""
    fields = _ROPE.to_megatron(config)
    numbers = object_of(fields, "rope_parameters")
    if not numbers:
        return fields
    factor = number("short_mscale", numbers.get("short_mscale"))
    return {**fields, "rope_parameters": {**numbers, "attention_factor": factor}}


def _write_rope(config: Config) -> dict[str, Any]:
    numbers = object_of(config, "rope_parameters")
    plain = {name: value for name, value in numbers.items() if name != "attention_factor"}
    return _ROPE.to_huggingface({**config, "rope_parameters": plain or None})


CONFIG = (
    *sizes(positions_default=131072),
    field("num_query_groups", "num_key_value_heads", default=value(8)),
    *layer_norm("rms_norm_eps"),
    *dropouts(),
    *mixtral.GATED,
    fixed(add_bias_linear=False, qk_layernorm=False),
    flag("add_qkv_bias", "attention_bias"),
    Field(
        lambda config: {"attention_output_bias": bool(config.get("attention_bias"))},
        lambda config: agreeing(config, {"attention_output_bias": config.get("add_qkv_bias", False)}),
    ),
    field("output_layer_bias", "lm_head_bias", default=value(False)),
    switches(head_bias="output_layer_bias"),
    Field(_read_rope, _write_rope),
    window("window_size", "sliding_window", default=None),
    *routed(experts="num_local_experts", topk="num_experts_per_tok", ffn="intermediate_size"),
    trained_with(num_experts_per_tok=2),
    fixed(moe_router_scoring="sparsemixer", moe_router_pre_softmax=True),
    field("moe_router_sparsemixer_jitter", "router_jitter_noise", default=value(0.01)),
    not_computed("input_jitter_noise", off=0.0),
    auxiliary_loss(),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "num_local_experts": 8, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.2,
}  # fmt: skip
PROVIDER = ("moe_router_scoring", "moe_router_sparsemixer_jitter", "attention_output_bias", "output_layer_bias")
