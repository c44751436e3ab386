"""Arcee: Llama whose feed-forward layer has no gate, and squares what ReLU lets through."""

from converter.config import flag
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama
from converter.rules import column_parallel

MODELS = "AFM 4.5B"
ARCHITECTURE = "ArceeForCausalLM"

UP = column_parallel("mlp.linear_fc1.weight", "mlp.up_proj.weight", "ffn", "hidden")
RULES = llama.decoder(
    *llama.BIASED_ATTENTION,
    llama.MLP[0],
    UP,
    column_parallel("mlp.linear_fc1.bias", "mlp.up_proj.bias", "ffn", when=llama.biased, absent=llama.plain_mlp),
    *llama.BIASED_MLP[3:],
)
CONFIG = (
    *sizes(positions_default=4096),
    *dropouts(),
    *rms_norm(default=1e-5),
    *mlp("relu2", gated=False),
    llama.PLAIN_ATTENTION,
    flag("add_bias_linear", "attention_bias", "mlp_bias"),
    rope("default", "linear", "llama3", "yarn"),
    no_window("window_size"),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 20.0, "original_max_position_embeddings": 32, "mscale": 1.0,
        "beta_fast": 32.0, "beta_slow": 1.0,
    },
}  # fmt: skip
