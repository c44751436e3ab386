"""dots.llm1: Qwen3's attention, and DeepSeek-V3's experts; the last layers may slide."""

from converter.config import Config, Field, field, fixed, number, value
from converter.config_layers import FULL, SLIDING, layers_of, window_pattern
from converter.config_parts import dropouts, not_computed, only, rms_norm, routed, sizes
from converter.config_rope import rope
from converter.config_router import best_groups, dense_first, shared_multiple, sigmoid_scores
from converter.families import deepseek_v3, llama, mixtral, qwen2, qwen3

MODELS = "dots.llm1"
ARCHITECTURE = "Dots1ForCausalLM"

RULES = llama.decoder(*llama.ATTENTION, *qwen3.NORMS, *mixtral.mixed(llama.MLP, deepseek_v3.SPARSE))
_NORMED = not_computed("norm_topk_prob", off=True)


def _types(config: Config) -> list[str]:
    """Return the types of layers, of which those from `max_window_layers` on slide if there is a window."""
    first = number("max_window_layers", config.get("max_window_layers", 62))
    slide = config.get("sliding_window", 4096) is not None
    return [SLIDING if slide and layer >= first else FULL for layer in range(layers_of(config))]


CONFIG = (
    *sizes(),
    field("num_query_groups", "num_key_value_heads", default=value(32)),
    *rms_norm(),
    *dropouts(),
    *mixtral.GATED,
    *llama.NO_BIAS,
    fixed(add_qkv_bias=False, qk_layernorm=True),
    only(attention_bias=False),
    rope("default", "yarn"),
    window_pattern(_types, default=4096, pattern=qwen2.first_sliding),
    *routed(experts="n_routed_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size"),
    dense_first(0),
    *sigmoid_scores(scale=1.0),
    best_groups(1, 1, best=2),
    *shared_multiple(1),
    Field(lambda config: _NORMED.to_megatron({"norm_topk_prob": False, **config}), _NORMED.to_huggingface),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 2, "n_group": 4,
    "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "sliding_window": 8,
    "max_window_layers": 2,
}  # fmt: skip
PROVIDER = ("moe_router_group_score",)
