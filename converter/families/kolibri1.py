"""Kolibri 1: EXAONE 4's attention, norms before and after both branches, and experts in every layer, chosen by logits and a
bias."""

from dataclasses import replace

from converter.config import Config, field, fixed, value
from converter.config_layers import FULL, layer_types, no_rope, one_full_in, window_pattern
from converter.config_nested import renamed
from converter.config_parts import dropouts, only, rms_norm, routed, shared_experts, sizes
from converter.config_rope import rope
from converter.config_router import FP32_SCORES
from converter.families import deepseek_v3, llama, mixtral, qwen3
from converter.rules import replicated

MODELS = "Kolibri 1"
ARCHITECTURE = "Kolibri1ForCausalLM"

RULES = llama.decoder(
    *llama.ATTENTION,
    *qwen3.NORMS,
    replicated("self_attention.linear_proj.post_layernorm.weight", "post_attn_norm.weight", "hidden"),
    *mixtral.moe(),
    replace(deepseek_v3.BIAS, huggingface="moe.router.expert_bias"),
    *mixtral.shared(),
    replicated("mlp.post_layernorm.weight", "post_ffn_norm.weight", "hidden"),
)
TYPES = one_full_in(5)


def full_beside_sliding(config: Config) -> list[bool]:
    """Return of each layer whether it sees all tokens, in a model of which others slide: it has no positions."""
    found = layer_types(config, TYPES)
    return [config.get("sliding_window", 513) is not None and one == FULL for one in found]


CONFIG = (
    *sizes(head_dim_default=128, positions_default=262144, ffn="moe_intermediate_size"),
    field("num_query_groups", "num_key_value_heads", default=value(4)),
    *dropouts(),
    *rms_norm(),
    *mixtral.GATED,
    *llama.NO_BIAS,
    rope("default", "yarn"),
    window_pattern(TYPES, default=513),
    no_rope(full_beside_sliding),
    renamed(
        routed(experts="num_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size", renormalized="norm_topk_prob",
               absent=False),
        num_local_experts="num_experts",
    ),
    *shared_experts("shared_expert_intermediate_size"),
    fixed(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=None,
        moe_layer_freq=1,
        add_qkv_bias=False,
        qk_layernorm=True,
        post_layernorms=True,
    ),
    FP32_SCORES,
    only(attention_bias=False),
)  # fmt: skip
EXTRAS = llama.EXTRAS
SMALL = {
    "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
PROVIDER = ("post_layernorms",)
WEIGHTS_ONLY = "experts are chosen by logits and a bias, and megatron-core chooses by sigmoids and a bias"
