"""Ling 2.0 and Ring 2.0 (remote code): Sarvam's names and arithmetic, with a part of each head turned.

Names and settings are those of `modeling_bailing_moe_v2.py` in the published repositories.
"""

from converter.config import field, switches, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, only, rms_norm, routed, sizes, trained_with
from converter.config_rope import partial_rotary, rope
from converter.config_router import best_groups, dense_first, shared_multiple, sigmoid_scores
from converter.families import llama, mixtral, sarvam_moe

MODELS = "Ling 2.0, Ring 2.0 (remote code)"
ARCHITECTURE = "BailingMoeV2ForCausalLM"

RULES = sarvam_moe.RULES
CONFIG = (
    *sizes(positions_default=16384),
    *rms_norm(default=1e-5),
    *dropouts(),
    *mixtral.GATED,
    *llama.NO_BIAS,
    field("add_qkv_bias", "use_qkv_bias", default=value(False)),
    field("qk_layernorm", "use_qk_norm", default=value(False)),
    switches(qkv_bias="add_qkv_bias", qk_norms="qk_layernorm"),
    rope("default", "yarn", partial=partial_rotary(1.0)),
    no_window("window_size"),
    *routed(experts="num_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size"),
    *sigmoid_scores(scale=2.5),
    best_groups(8, 4, best=2, experts="num_experts"),
    *shared_multiple(1, name="num_shared_experts"),
    dense_first(0),
    only(use_bias=False, num_nextn_predict_layers=0),
    trained_with(norm_head=False, score_function="sigmoid"),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "head_dim": 16, "partial_rotary_factor": 0.5, "use_qk_norm": True, "num_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 48, "num_shared_experts": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
}  # fmt: skip
PROVIDER = ("moe_router_group_score", "rope_parameters")
