"""Code World Model: Llama whose layers slide, but for each fourth."""

from converter.config import flag, named
from converter.config_layers import FULL, SLIDING, layers_of, window_pattern
from converter.config_parts import Config, dropouts, mlp, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama

MODELS = "Code World Model 32B"
ARCHITECTURE = "CwmForCausalLM"

RULES = llama.RULES


def _first_of_four_full(config: Config) -> list[str]:
    return [SLIDING if layer % 4 else FULL for layer in range(layers_of(config))]


ROPE = {
    "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CONFIG = (
    *sizes(groups_default=8, head_dim_default=128, positions_default=131072),
    *dropouts(),
    *rms_norm(default=1e-5),
    *mlp("silu", gated=True),
    llama.PLAIN_ATTENTION,
    flag("add_bias_linear", "mlp_bias"),
    named(attention_bias=False),
    rope("default", "linear", "llama3", "yarn", theta=1e6, default=ROPE),
    window_pattern(_first_of_four_full, default=8192, unused=8192),
)
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 8, "sliding_window": 8, "rope_parameters": {**ROPE, "original_max_position_embeddings": 16}}
