"""Ministral: Mistral of which some layers slide and the others see every token before one."""

from converter.config_layers import FULL, SLIDING, layers_of, window_pattern
from converter.config_parts import Config, mlp
from converter.families import llama, mistral

MODELS = "Ministral 8B"
ARCHITECTURE = "MinistralForCausalLM"

RULES = llama.RULES


def _all_slide(config: Config) -> list[str]:
    return [FULL if config.get("sliding_window", 4096) is None else SLIDING] * layers_of(config)


CONFIG = (
    *mistral.SIZES,
    *mlp("silu", gated=True),
    llama.PLAIN_ATTENTION,
    window_pattern(_all_slide, default=4096),
)
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
