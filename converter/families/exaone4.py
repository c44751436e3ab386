"""EXAONE 4: norms after each branch alone, and of query and key; full layers beside sliding ones have no positions."""

from collections.abc import Sequence

from converter.config import Config, fixed
from converter.config_layers import FULL, all_full, layer_types, no_rope, one_full_in, window_pattern
from converter.config_parts import dropouts, mlp, rms_norm, sizes
from converter.config_rope import rope
from converter.families import gemma2, llama, qwen3

MODELS = "EXAONE 4"
ARCHITECTURE = "Exaone4ForCausalLM"

TYPES = one_full_in(4)
RULES = llama.decoder(*llama.ATTENTION[1:], *qwen3.NORMS, gemma2.POST_NORMS[0], *llama.MLP[1:], gemma2.POST_NORMS[1])


def types(config: Config) -> Sequence[str]:
    """Return the types of layers: all are full without a window."""
    without = config.get("sliding_window", 4096) is None
    return all_full(config) if without else TYPES(config)


def full_beside_sliding(config: Config) -> list[bool]:
    """Return of each layer whether it sees all tokens, in a model of which others slide: it has no positions."""
    kinds = layer_types(config, types)
    sliding = config.get("sliding_window", 4096) is not None
    return [sliding and kind == FULL for kind in kinds]


CONFIG = (
    *sizes(),
    *dropouts(),
    *rms_norm(default=1e-5),
    *mlp("silu", gated=True),
    fixed(add_qkv_bias=False, qk_layernorm=True, pre_layernorms=False, post_layernorms=True),
    *llama.NO_BIAS,
    rope("default", "llama3"),
    window_pattern(types, default=4096),
    no_rope(full_beside_sliding),
)
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 4, "layer_types": None}
PROVIDER = ("pre_layernorms", "post_layernorms")
