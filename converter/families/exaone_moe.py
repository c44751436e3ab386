"""K-EXAONE: EXAONE 4's attention with norms before it, and DeepSeek-V3's experts. Its layers of multi-token prediction pass
through."""

from dataclasses import replace

from converter.config import field, fixed, value
from converter.config_layers import no_rope, window_pattern
from converter.config_parts import dropouts, not_computed, rms_norm, routed, sizes
from converter.config_rope import rope
from converter.config_router import best_groups, kinds_of_layers, shared_multiple, sigmoid_scores
from converter.families import deepseek_v3, exaone4, llama, mixtral, qwen3

MODELS = "K-EXAONE"
ARCHITECTURE = "ExaoneMoeForCausalLM"

BIAS = replace(deepseek_v3.BIAS, huggingface="mlp.e_score_correction_bias")
RULES = llama.decoder(*llama.ATTENTION, *qwen3.NORMS, *mixtral.mixed(llama.MLP, (*mixtral.moe(), BIAS, *mixtral.shared())))
CONFIG = (
    *sizes(),
    field("num_query_groups", "num_key_value_heads", default=value(32)),
    *rms_norm(default=1e-5),
    *dropouts(),
    *mixtral.GATED,
    *llama.NO_BIAS,
    fixed(add_qkv_bias=False, qk_layernorm=True),
    rope("default", "llama3"),
    window_pattern(exaone4.types, default=4096),
    no_rope(exaone4.full_beside_sliding),
    *routed(experts="num_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size"),
    kinds_of_layers(1),
    *sigmoid_scores(scale=2.5),
    best_groups(1, 1, best=2, experts="num_experts"),
    *shared_multiple(1, name="num_shared_experts"),
    not_computed("norm_topk_prob", off=True),
)
EXTRAS = llama.EXTRAS
PASSTHROUGH_PREFIXES = ("mtp.",)
SMALL = {
    "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 48, "num_shared_experts": 2,
    "n_group": 4, "topk_group": 2, "sliding_window": 8, "sliding_window_pattern": 4, "layer_types": None,
}  # fmt: skip
PROVIDER = ("moe_router_group_score",)
