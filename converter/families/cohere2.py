"""Cohere 2 (Command R7B, A): parallel branches, three of four layers slide and the others have no positions, scaled logits."""

from converter.config import Config, field, fixed, value
from converter.config_layers import FULL, layer_types, no_rope, one_full_in, window_pattern
from converter.config_parts import dropouts, layer_norm, mlp, multipliers, only, sizes
from converter.config_rope import rope
from converter.families import cohere, llama

MODELS = "Command R7B, Command A"
ARCHITECTURE = "Cohere2ForCausalLM"

TYPES = one_full_in(4)
RULES = (
    *llama.decoder(*cohere.ONE_NORM, *llama.ATTENTION[1:], *llama.MLP[1:]),
    cohere.FINAL_BIAS,
)


def _full(config: Config) -> list[bool]:
    return [kind == FULL for kind in layer_types(config, TYPES)]


CONFIG = (
    *sizes(positions_default=8192, tied=True),
    *dropouts(),
    *layer_norm(),
    *mlp("silu", gated=True),
    llama.PLAIN_ATTENTION,
    *llama.NO_BIAS,
    fixed(parallel_residual="one_norm", rotary_interleaved=True),
    rope("default"),
    window_pattern(TYPES, default=4096),
    no_rope(_full),
    *multipliers(logits=field("mup_output_mult", "logit_scale", default=value(0.0625))),
    only(attention_bias=False),
)
EXTRAS = llama.EXTRAS
SMALL = {"sliding_window": 8}
PROVIDER = ("parallel_residual",)
