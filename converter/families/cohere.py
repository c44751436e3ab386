"""Command R: both branches read one norm, a LayerNorm without bias; Command R+ has a norm of its own for each head."""

from converter.config import field, fixed, switches, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, layer_norm, mlp, multipliers, only, sizes
from converter.config_rope import rope
from converter.families import llama
from converter.model import Model
from converter.rules import Indices, always, replicated

MODELS = "Command R, Command R+, Aya 23"
ARCHITECTURE = "CohereForCausalLM"


def _normed(model: Model, _indices: Indices) -> bool:
    return model.head_norms


ONE_NORM = (
    replicated("input_layernorm.weight", "input_layernorm.weight", "hidden"),
    replicated("input_layernorm.bias", "", "hidden", absent=always),
)
FINAL_BIAS = replicated("decoder.final_layernorm.bias", "", "hidden", absent=always)
HEAD_NORMS = (
    replicated("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "heads", "head_dim", when=_normed),
    replicated("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "groups", "head_dim", when=_normed),
)
RULES = (*llama.decoder(*ONE_NORM, *llama.ATTENTION[1:], *HEAD_NORMS, *llama.MLP[1:]), FINAL_BIAS)
SIZES = (
    *sizes(tied=True, positions_default=8192, head_dim=""),
    *layer_norm(),
    *dropouts(),
    *mlp("silu", gated=True),
    *llama.NO_BIAS,
    only(attention_bias=False),
    *multipliers(logits=field("mup_output_mult", "logit_scale", default=value(0.0625))),
    fixed(add_qkv_bias=False, parallel_residual="one_norm", rotary_interleaved=True),
)
CONFIG = (
    *SIZES,
    rope("default", theta=500000.0),
    no_window("window_size"),
    field("qk_layernorm", "use_qk_norm", default=value(False)),
    switches(head_norms="qk_layernorm"),
    fixed(qk_layernorm_scope="each_head"),
)
EXTRAS = llama.EXTRAS
SMALL = {"logit_scale": 0.25}
PROVIDER = ("parallel_residual", "qk_layernorm_scope")
