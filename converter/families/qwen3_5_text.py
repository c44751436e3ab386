"""Qwen3.5, text: Qwen3-Next's layers with a dense feed-forward part; the delta net's input is projected by four tensors."""

from converter.config import field, fixed, value
from converter.config_parts import sizes
from converter.config_router import prediction_layers
from converter.families import llama, qwen3_next
from converter.families.qwen3_next import NET
from converter.rules import column_parallel, sections

MODELS = "Qwen3.5, dense, text"
ARCHITECTURE = "Qwen3_5ForCausalLM"

SEPARATE = (
    *sections(f"{NET}in_proj.weight.{{query,key,value}}", "linear_attn.in_proj_qkv.weight",
              ("l_keys", "l_keys", "l_values"), "hidden"),
    column_parallel(f"{NET}in_proj.weight.z", "linear_attn.in_proj_z.weight", "l_values", "hidden"),
    column_parallel(f"{NET}in_proj.weight.beta", "linear_attn.in_proj_b.weight", "linear_heads", "hidden"),
    column_parallel(f"{NET}in_proj.weight.alpha", "linear_attn.in_proj_a.weight", "linear_heads", "hidden"),
)  # fmt: skip
MIXED = qwen3_next.mixed(qwen3_next.ATTENTION, qwen3_next.delta_net(*SEPARATE))
RULES = (*llama.decoder(*MIXED, *llama.MLP), *qwen3_next.prediction(*llama.MLP))
PREDICTION = prediction_layers("mtp_num_hidden_layers", most=1)
CONFIG = (
    *sizes(head_dim_default=256, positions_default=32768),
    *qwen3_next.PARTS,
    field("num_query_groups", "num_key_value_heads", default=value(4)),
    fixed(num_moe_experts=None),
    *qwen3_next.MIXER,
    PREDICTION,
)
EXTRAS = llama.EXTRAS
ROPE = {
    "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}  # fmt: skip
"""Sections of positions in pictures; those of text are the same in all three."""

SMALL = {**qwen3_next.LINEAR_SMALL, "rope_parameters": ROPE}
