"""GLM-4 0414: norms before and after both branches; half of each head is turned, in pairs; one tensor of gate and up."""

from converter.config import field, fixed, switches, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, rms_norm, sizes
from converter.config_rope import partial_rotary, rope
from converter.families import llama
from converter.model import Model
from converter.rules import Indices, gated_mlp, qkv, replicated

MODELS = "GLM-4-0414, GLM-Z1"
ARCHITECTURE = "Glm4ForCausalLM"


def _biased(model: Model, _indices: Indices) -> bool:
    return model.qkv_bias


ATTENTION = (*llama.ATTENTION, qkv("self_attention.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias", when=_biased))
FEED_FORWARD = (gated_mlp("mlp.linear_fc1.weight", "mlp.gate_up_proj.weight", "ffn", "hidden"), llama.MLP[2])
RULES = llama.decoder(
    *ATTENTION,
    replicated("self_attention.linear_proj.post_layernorm.weight", "post_self_attn_layernorm.weight", "hidden"),
    llama.MLP[0],
    *FEED_FORWARD,
    replicated("mlp.linear_fc2.post_layernorm.weight", "post_mlp_layernorm.weight", "hidden"),
)
SIZES = (
    *sizes(positions_default=131072),
    field("num_query_groups", "num_key_value_heads", default=value(2)),
    field("kv_channels", "head_dim", default=value(128)),
    *rms_norm(default=1.5625e-07),
    *dropouts(),
    *mlp("silu", gated=True),
    *llama.NO_BIAS,
    field("add_qkv_bias", "attention_bias", default=value(True)),
    switches(qkv_bias="add_qkv_bias"),
    rope("default", partial=partial_rotary(0.5)),
    no_window("window_size"),
    fixed(qk_layernorm=False, rotary_interleaved=True),
)
CONFIG = (*SIZES, fixed(post_layernorms=True))
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 16, "attention_bias": True}
PROVIDER = ("post_layernorms",)
