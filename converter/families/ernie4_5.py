"""ERNIE 4.5, dense: Llama whose rotary embeddings turn neighbouring channels."""

from converter.config import fixed, flag, named
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama

MODELS = "ERNIE 4.5 0.3B, dense"
ARCHITECTURE = "Ernie4_5ForCausalLM"

RULES = llama.RULES
CONFIG = (
    *sizes(groups_default=2, head_dim_default=128, positions_default=131072, tied=True),
    *dropouts(attention=""),
    *rms_norm(default=1e-5),
    *mlp("silu", gated=True),
    fixed(add_qkv_bias=False, qk_layernorm=False, rotary_interleaved=True),
    flag("add_bias_linear", "use_bias"),
    named(attention_bias=lambda model: model.use_bias, mlp_bias=lambda model: model.use_bias),
    rope("default", "linear", "llama3", "yarn", theta=5e5),
    no_window("window_size"),
)
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 16, "use_bias": True}
