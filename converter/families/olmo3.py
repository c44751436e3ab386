"""OLMo 3: norms after each branch alone and over all heads of query and key, three of four layers slide, YaRN in the others."""

from converter.config import fixed
from converter.config_layers import one_full_in, window_pattern
from converter.config_parts import dropouts, mlp, only, rms_norm, sizes
from converter.config_rope import rope_by_type
from converter.families import gemma2, llama, olmo2

MODELS = "OLMo 3"
ARCHITECTURE = "Olmo3ForCausalLM"

RULES = llama.decoder(*llama.ATTENTION[1:], *olmo2.NORMS[:2], gemma2.POST_NORMS[0], *llama.MLP[1:], gemma2.POST_NORMS[1])
CONFIG = (
    *sizes(head_dim=""),
    *dropouts(),
    *rms_norm(default=1e-5),
    *mlp("silu", gated=True),
    fixed(add_qkv_bias=False, qk_layernorm=True, qk_layernorm_scope="all_heads", pre_layernorms=False, post_layernorms=True),
    *llama.NO_BIAS,
    rope_by_type("default", "yarn", theta=500000.0),
    window_pattern(one_full_in(4), default=4096),
    only(attention_bias=False),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "sliding_window": 8,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
            "attention_factor": 1.2, "beta_fast": 32, "beta_slow": 1,
        },
    },
}  # fmt: skip
PROVIDER = ("pre_layernorms", "post_layernorms", "qk_layernorm_scope", "sliding_rope")
