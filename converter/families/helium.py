"""Helium: Llama whose rotary embeddings turn neighbouring channels; attention's output never has a bias."""

from converter.config import fixed, flag, named
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama, seed_oss

MODELS = "Helium 1"
ARCHITECTURE = "HeliumForCausalLM"

RULES = seed_oss.RULES
CONFIG = (
    *sizes(groups_default=20, head_dim_default=128, positions_default=4096),
    *dropouts(),
    *rms_norm(default=1e-8),
    *mlp("silu", gated=True),
    fixed(qk_layernorm=False, rotary_interleaved=True),
    flag("add_qkv_bias", "attention_bias"),
    flag("add_bias_linear", "mlp_bias"),
    named(attention_out_bias=False),
    rope("default", "linear", "llama3", "yarn", theta=1e5),
    no_window("window_size"),
)
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
