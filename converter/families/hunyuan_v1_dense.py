"""Hunyuan V1, dense: Llama, and a norm over each head of queries and keys after they are turned."""

from converter.config import fixed
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, only, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama
from converter.rules import replicated

MODELS = "Hunyuan V1, dense"
ARCHITECTURE = "HunYuanDenseV1ForCausalLM"

NORMS = (
    replicated("self_attention.q_layernorm.weight", "self_attn.query_layernorm.weight", "head_dim"),
    replicated("self_attention.k_layernorm.weight", "self_attn.key_layernorm.weight", "head_dim"),
)
RULES = llama.decoder(*llama.ATTENTION, *NORMS, *llama.MLP)
CONFIG = (
    *sizes(),
    *dropouts(),
    *rms_norm(default=1e-5),
    *mlp("silu", gated=True),
    fixed(add_qkv_bias=False, qk_layernorm=True, qk_layernorm_after_rope=True),
    *llama.NO_BIAS,
    rope("default", "linear"),
    no_window("window_size"),
    only(attention_bias=False),
)
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 16}
PROVIDER = ("qk_layernorm_after_rope",)
