"""Qwen3-Next: three of four layers mix tokens by a gated delta net, the others by gated attention; experts, and one for all.

Norms multiply by 1 + their weight on both sides, but for those of the delta net: Hugging Face's multiply by their weight.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from converter.config import Config, count, field, fixed, named, value
from converter.config_experts import SOFTMAX, auxiliary_loss, each_nth
from converter.config_layers import FULL, layers_of
from converter.config_parts import by_layer, dimension, dropouts, inverted, only, rms_norm, routed, shared_experts, sizes
from converter.config_rope import partial_rotary, rope
from converter.config_router import prediction_layers
from converter.families import llama, mixtral, qwen2_moe, qwen3
from converter.model import Model
from converter.rows import gated_by_group
from converter.rules import Indices, Rule, column_parallel, replicated, row_parallel, sections, under

MODELS = "Qwen3-Next 80B-A3B"
ARCHITECTURE = "Qwen3NextForCausalLM"

LINEAR = "linear_attention"
NET = "self_attention."


def is_linear(model: Model, indices: Indices) -> bool:
    """Return whether the layer has a gated delta net."""
    return indices["layer"] in model.linear_layers


def is_full(model: Model, indices: Indices) -> bool:
    """Return whether the layer has attention."""
    return indices["layer"] not in model.linear_layers


GATED_QKV = Rule(
    "self_attention.linear_qkv.weight",
    "self_attn.{q,k,v}_proj.weight",
    (("gated_queries", "hidden"), ("keys", "hidden"), ("keys", "hidden")),
    gated_by_group,
    partition_dim=0,
)
ATTENTION = (llama.ATTENTION[0], GATED_QKV, llama.ATTENTION[2], *qwen3.NORMS)


def delta_net(*projections: Rule) -> Iterator[Rule]:
    """Yield the rules of a gated delta net whose input is projected by these."""
    at = "linear_attn."
    yield replicated(f"{NET}in_proj.layer_norm_weight", "input_layernorm.weight", "hidden", alias="input_layernorm.weight")
    yield from projections
    parts = ("l_keys", "l_keys", "l_values")
    yield from sections(f"{NET}conv1d.weight.{{query,key,value}}", f"{at}conv1d.weight", parts, 1, "linear_kernel")
    yield column_parallel(f"{NET}A_log", f"{at}A_log", "linear_heads")
    yield column_parallel(f"{NET}dt_bias", f"{at}dt_bias", "linear_heads")
    yield replicated(f"{NET}out_norm.weight", f"{at}norm.weight", "l_value", offset=-1.0)
    yield row_parallel(f"{NET}out_proj.weight", f"{at}out_proj.weight", "hidden", "l_values")


def mixed(attention: Iterable[Rule], linear: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return the rules of layers of which some have attention and others a gated delta net."""
    return (*(replace(rule, when=is_full) for rule in attention), *(replace(rule, when=is_linear) for rule in linear))


GROUPED = (
    *sections(f"{NET}in_proj.weight.{{query,key,value,z}}", "linear_attn.in_proj_qkvz.weight",
              ("l_keys", "l_keys", "l_values", "l_values"), "hidden", groups="linear_groups"),
    *sections(f"{NET}in_proj.weight.{{beta,alpha}}", "linear_attn.in_proj_ba.weight",
              ("linear_heads", "linear_heads"), "hidden", groups="linear_groups"),
)  # fmt: skip
SPARSE = (*mixtral.moe(), *qwen2_moe.SHARED)


def prediction(*layer: Rule) -> tuple[Rule, ...]:
    """Return the rules of a layer of multi-token prediction: a layer of these, with attention, and what is around it."""
    around = (
        replicated("enorm.weight", "pre_fc_norm_embedding.weight", "hidden"),
        replicated("hnorm.weight", "pre_fc_norm_hidden.weight", "hidden"),
        column_parallel("eh_proj.weight", "fc.weight", "hidden", "both"),
        replicated("final_layernorm.weight", "norm.weight", "hidden"),
    )
    return (
        *under("mtp.layers.{mtp}", "mtp", around),
        *under("mtp.layers.{mtp}.transformer_layer", "mtp.layers.{mtp}", (*ATTENTION, *layer)),
    )


RULES = (
    *llama.decoder(*mixed(ATTENTION, delta_net(*GROUPED)), *mixtral.mixed(llama.MLP, SPARSE)),
    *prediction(*SPARSE),
)


def each_full(config: Config) -> Sequence[str]:
    """Return the types of layers of which each `full_attention_interval`-th has attention."""
    every = count({"full_attention_interval": config.get("full_attention_interval", 4)}, "full_attention_interval")
    return [FULL if (layer + 1) % every == 0 else LINEAR for layer in range(layers_of(config))]


MIXER = (
    fixed(experimental_attention_variant="gated_delta_net", attention_output_gate=True, add_qkv_bias=False, qk_layernorm=True),
    by_layer("linear_attention_freq", "layer_types", {FULL: 0, LINEAR: 1}, size="linear_layers", default=each_full),
    *dimension("l_key", "linear_key_head_dim", default=128),
    *dimension("l_value", "linear_value_head_dim", default=128),
    *dimension("linear_groups", "linear_num_key_heads", default=16),
    *dimension("linear_heads", "linear_num_value_heads", default=32),
    *dimension("linear_kernel", "linear_conv_kernel_dim", default=4),
    named(
        stacked=False,
        both=lambda model: 2 * model.hidden,
        gated_queries=lambda model: 2 * model.queries,
        l_keys=lambda model: model.linear_groups * model.l_key,
        l_values=lambda model: model.linear_heads * model.l_value,
    ),
    only(attention_bias=False, attn_output_gate=True),
)
PARTS = (
    *dropouts(),
    *rms_norm(zero_centered=True),
    *mixtral.GATED,
    *llama.NO_BIAS,
    rope("default", partial=partial_rotary(0.25)),
)
EXPERTS = (
    *routed(experts="num_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size"),
    *shared_experts("shared_expert_intermediate_size"),
    fixed(moe_shared_expert_gate=True),
    SOFTMAX,
    auxiliary_loss(),
)
CONFIG = (
    *sizes(head_dim_default=256, positions_default=32768),
    field("num_query_groups", "num_key_value_heads", default=value(2)),
    *PARTS,
    *EXPERTS,
    inverted("moe_router_pre_softmax", "norm_topk_prob"),
    each_nth(),
    *MIXER,
    prediction_layers(most=1),
)
EXTRAS = llama.EXTRAS
LINEAR_SMALL = {
    "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": [LINEAR, FULL, LINEAR, LINEAR],
}  # fmt: skip
EXPERTS_SMALL = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80,
}  # fmt: skip
SMALL = {**LINEAR_SMALL, **EXPERTS_SMALL, "mlp_only_layers": [1]}
