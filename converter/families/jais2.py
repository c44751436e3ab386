"""Jais 2: LayerNorm, squared ReLU without a gate, and biases that may be switched off."""

from converter.config import flag
from converter.config_layers import no_window
from converter.config_parts import dropouts, layer_norm, mlp, sizes
from converter.config_rope import rope
from converter.families import llama, nemotron

MODELS = "Jais 2"
ARCHITECTURE = "Jais2ForCausalLM"

RULES = nemotron.RULES
CONFIG = (
    *sizes(positions_default=8192),
    *dropouts(),
    *layer_norm(),
    *mlp("relu2", gated=False),
    llama.PLAIN_ATTENTION,
    flag("add_bias_linear", "attention_bias", "mlp_bias", default=True),
    rope("default", "linear", "yarn"),
    no_window("window_size"),
)
EXTRAS = llama.EXTRAS
