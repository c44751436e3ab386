"""OLMo 2: norms after the branches instead of before, and norms over all heads of queries and of keys together."""

from converter.config import fixed
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, only, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama
from converter.rules import replicated

MODELS = "OLMo 2"
ARCHITECTURE = "Olmo2ForCausalLM"

NORMS = (
    replicated("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "queries"),
    replicated("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "keys"),
    replicated("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
    replicated("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm.weight", "hidden"),
)
RULES = llama.decoder(*llama.ATTENTION[1:], *NORMS, *llama.MLP[1:])
SIZES = (
    *sizes(head_dim=""),
    *rms_norm(default=1e-5),
    *dropouts(),
    *mlp("silu", gated=True),
    *llama.NO_BIAS,
    only(attention_bias=False),
    fixed(add_qkv_bias=False, qk_layernorm=True, qk_layernorm_scope="all_heads", pre_layernorms=False, post_layernorms=True),
)
CONFIG = (*SIZES, rope("default"), no_window("window_size"))
EXTRAS = llama.EXTRAS
PROVIDER = ("pre_layernorms", "post_layernorms", "qk_layernorm_scope")
