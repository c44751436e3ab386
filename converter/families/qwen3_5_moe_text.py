"""Qwen3.5 with experts, text: Qwen3-Next's experts in each layer; files may hold all experts of a layer in one tensor."""

from converter.config import count, field, fixed, value
from converter.config_parts import not_computed, sizes
from converter.families import llama, qwen3_5_text, qwen3_next

MODELS = "Qwen3.5 with experts, text"
ARCHITECTURE = "Qwen3_5MoeForCausalLM"

RULES = (*llama.decoder(*qwen3_5_text.MIXED, *qwen3_next.SPARSE), *qwen3_next.prediction(*qwen3_next.SPARSE))
CONFIG = (
    *sizes(
        head_dim_default=256, positions_default=32768, ffn_default=lambda config: count(config, "moe_intermediate_size")
    ),  # no layer is dense
    field("num_query_groups", "num_key_value_heads", default=value(2)),
    *qwen3_next.PARTS,
    *qwen3_next.EXPERTS,
    fixed(moe_router_pre_softmax=False),
    not_computed("norm_topk_prob", off=True),
    *qwen3_next.MIXER,
    qwen3_5_text.PREDICTION,
)
EXTRAS = llama.EXTRAS
STACKED = {
    "mlp.experts.{expert}.{gate_proj,up_proj}.weight": "mlp.experts.gate_up_proj",
    "mlp.experts.{expert}.down_proj.weight": "mlp.experts.down_proj",
}
SMALL = {**qwen3_5_text.SMALL, **qwen3_next.EXPERTS_SMALL}
