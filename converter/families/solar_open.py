"""Solar Open: Llama's attention, and DeepSeek-V3's experts in every layer."""

from converter.config import Config, count, field, fixed, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, rms_norm, sizes
from converter.config_rope import rope
from converter.families import deepseek_v3, glm4, glm4_moe, llama, mixtral

MODELS = "Solar Open"
ARCHITECTURE = "SolarOpenForCausalLM"

RULES = llama.decoder(*glm4.ATTENTION, *deepseek_v3.SPARSE)


def _no_dense(config: Config) -> int:
    """Return the size that dense layers would have: there are none, and published files name one all the same."""
    return count(config, "moe_intermediate_size")


CONFIG = (
    *sizes(positions_default=131072, ffn_default=_no_dense),
    field("num_query_groups", "num_key_value_heads", default=value(8)),
    field("kv_channels", "head_dim", default=value(128)),
    *rms_norm(default=1e-5),
    *dropouts(),
    *mixtral.GATED,
    *llama.NO_BIAS,
    *glm4_moe.ATTENTION_BIAS,
    fixed(qk_layernorm=False),
    rope("default", "yarn", theta=1e6),
    no_window("window_size"),
    *glm4_moe.EXPERTS,
    fixed(moe_layer_freq=1),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "head_dim": 16, "attention_bias": True, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48,
    "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
}  # fmt: skip
PROVIDER = ("moe_router_group_score",)
