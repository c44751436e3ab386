"""SmolLM3: Llama whose every fourth layer has no rotary embeddings; those may slide."""

from typing import Any, cast

from converter.config import flag
from converter.config_layers import FULL, SLIDING, layers_of, no_rope, window_pattern
from converter.config_parts import Config, count, dropouts, mlp, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama
from formats.errors import UserError, format_untrusted

MODELS = "SmolLM3"
ARCHITECTURE = "SmolLM3ForCausalLM"

RULES = llama.RULES


def _without_rope(config: Config) -> list[bool]:
    given, layers = config.get("no_rope_layers"), layers_of(config)
    if not given:
        each = count({"no_rope_layer_interval": 4, **config}, "no_rope_layer_interval")
        return [(layer + 1) % each == 0 for layer in range(layers)]
    with_rope = cast("list[Any]", given)[:layers] if isinstance(given, list) else []
    if len(with_rope) != layers or any(mark not in (0, 1) for mark in with_rope):
        raise UserError(
            f"`no_rope_layers` is `{format_untrusted(given)}`, which should have 0 or 1 for each of {layers} layers",
            hint="the configuration is damaged",
        )
    return [not mark for mark in with_rope]


def _sliding(config: Config) -> list[str]:
    slides = config.get("use_sliding_window") and config.get("sliding_window") is not None
    return [SLIDING if slides and without else FULL for without in _without_rope(config)]


CONFIG = (
    *sizes(groups_default=4, positions_default=32768, tied=True),
    *dropouts(),
    *rms_norm(),
    *mlp("silu", gated=True),
    llama.PLAIN_ATTENTION,
    flag("add_bias_linear", "attention_bias", "mlp_bias"),
    rope("default", "linear", "llama3", "yarn", theta=2e6),
    no_rope(_without_rope, lambda without: {"no_rope_layers": [1 - mark for mark in without]}),
    window_pattern(_sliding, switch="use_sliding_window"),
)
EXTRAS = llama.EXTRAS
SMALL = {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8}
