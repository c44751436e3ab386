"""GLM-4 in transformers' form: gate and up projection in one tensor, biases of query, key and value, half of each head turned."""

from converter.config import field, fixed, flag, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, rms_norm, sizes
from converter.config_rope import partial_rotary, rope
from converter.families import llama
from converter.model import Model
from converter.rules import Indices, gated_mlp, with_bias

MODELS = "GLM-4 and GLM-Edge in transformers' form"
ARCHITECTURE = "GlmForCausalLM"


def _biased(model: Model, _indices: Indices) -> bool:
    return model.attention_bias


GATE_UP = gated_mlp("mlp.linear_fc1.weight", "mlp.gate_up_proj.weight", "ffn", "hidden")
ATTENTION = (llama.ATTENTION[0], *with_bias(llama.ATTENTION[1], when=_biased), llama.ATTENTION[2])
RULES = llama.decoder(*ATTENTION, llama.MLP[0], GATE_UP, llama.MLP[2])

CONFIG = (
    *sizes(positions_default=131072),
    field("num_query_groups", "num_key_value_heads", default=value(2)),
    field("kv_channels", "head_dim", default=value(128)),
    *dropouts(),
    *rms_norm(default=1.5625e-7),
    *mlp("silu", gated=True),
    fixed(add_bias_linear=False, qk_layernorm=False, rotary_interleaved=True),
    flag("add_qkv_bias", "attention_bias", default=True),
    rope("default", "linear", partial=partial_rotary(0.5)),
    no_window("window_size"),
)
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 16}
