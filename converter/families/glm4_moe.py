"""GLM-4.5: grouped queries, half of each head turned, DeepSeek-V3's experts, and layers that predict further tokens (MTP)."""

from dataclasses import replace

from converter.config import field, named, switches, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, not_computed, rms_norm, routed, sizes
from converter.config_rope import partial_rotary, rope
from converter.config_router import best_groups, dense_first, prediction_layers, shared_multiple, sigmoid_scores
from converter.families import deepseek_v3, glm4, llama, mixtral, qwen3
from converter.model import Model
from converter.rules import Indices

MODELS = "GLM-4.5, 4.6 and 4.7, and their Air"
ARCHITECTURE = "Glm4MoeForCausalLM"


def _normed(model: Model, _indices: Indices) -> bool:
    return model.qk_norms


NORMS = tuple(replace(rule, when=_normed) for rule in qwen3.NORMS)
ATTENTION = (*glm4.ATTENTION, *NORMS)
RULES = (
    *llama.decoder(*ATTENTION, *mixtral.mixed(llama.MLP, deepseek_v3.SPARSE)),
    *deepseek_v3.prediction(*ATTENTION, *deepseek_v3.SPARSE),
)

EXPERTS = (
    *routed(experts="n_routed_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size"),
    *sigmoid_scores(scale=1.0),
    best_groups(1, 1, best=2),
    *shared_multiple(1),
    not_computed("norm_topk_prob", off=True),
)
ATTENTION_BIAS = (field("add_qkv_bias", "attention_bias", default=value(False)), switches(qkv_bias="add_qkv_bias"))
CONFIG = (
    *sizes(positions_default=131072),
    field("num_query_groups", "num_key_value_heads", default=value(8)),
    *rms_norm(default=1e-5),
    *dropouts(),
    *mixtral.GATED,
    *llama.NO_BIAS,
    *ATTENTION_BIAS,
    field("qk_layernorm", "use_qk_norm", default=value(False)),
    switches(qk_norms="qk_layernorm"),
    rope("default", "yarn", partial=partial_rotary(0.5)),
    no_window("window_size"),
    *EXPERTS,
    dense_first(1),
    prediction_layers(),
    named(both=lambda model: 2 * model.hidden),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "attention_bias": True, "use_qk_norm": True, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48,
    "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 8.0, "attention_factor": 1.5,
        "original_max_position_embeddings": 32, "beta_fast": 4.0,
    },
}  # fmt: skip
PROVIDER = ("moe_router_group_score", "rope_parameters")
