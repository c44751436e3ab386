"""Flint: Qwen3's attention with a sink for each head; layers that slide have positions, full ones none; experts chosen by
sigmoids, and one that every token goes through."""

from collections.abc import Sequence

from converter.config import Config, field, fixed, value
from converter.config_experts import auxiliary_loss, each_nth
from converter.config_layers import FULL, SLIDING, layer_types, layers_of, no_rope, window_pattern
from converter.config_parts import not_computed, only, routed, shared_experts
from converter.config_rope import rope
from converter.config_router import FP32_SCORES
from converter.families import gpt_oss, llama, mixtral, qwen2_moe, qwen3

MODELS = "Flint"
ARCHITECTURE = "FlintForCausalLM"

SPARSE = (*mixtral.moe(), *qwen2_moe.SHARED[:2])
RULES = llama.decoder(
    *llama.ATTENTION, gpt_oss.sinks("self_attn.softmax_offset"), *qwen3.NORMS, *mixtral.mixed(llama.MLP, SPARSE)
)


def types(config: Config) -> Sequence[str]:
    """Return the types of layers of which the first two, each fourth and the last are full."""
    last = layers_of(config) - 1
    return [FULL if layer < 2 or layer % 4 == 1 or layer == last else SLIDING for layer in range(last + 1)]


def full(config: Config) -> list[bool]:
    """Return of each layer whether it sees all tokens: it has no positions."""
    return [one == FULL for one in layer_types(config, types)]


CONFIG = (
    *llama.SIZES,
    *mixtral.GATED,
    *llama.NO_BIAS,
    field("num_query_groups", "num_key_value_heads", default=value(4)),
    field("kv_channels", "head_dim", default=value(128)),
    field("seq_length", "max_position_embeddings", default=value(262144)),
    rope("default", "yarn"),
    window_pattern(types, default=513, unused=0),
    no_rope(full),
    *routed(experts="num_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size"),
    *shared_experts("shared_expert_intermediate_size"),
    each_nth(dense_by_default=(0, 1)),
    fixed(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=False,
        moe_router_pre_softmax=False,
        moe_router_num_groups=None,
        moe_shared_expert_gate=False,
        add_qkv_bias=False,
        qk_layernorm=True,
        softmax_type="learnable",
    ),
    FP32_SCORES,
    not_computed("norm_topk_prob", off=True),
    auxiliary_loss(0.0005),
    only(attention_bias=False),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80, "mlp_only_layers": [0], "sliding_window": 8,
}  # fmt: skip
