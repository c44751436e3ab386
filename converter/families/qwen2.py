"""Qwen2: Llama's weights, and biases of query, key and value; the last layers may slide."""

from collections.abc import Sequence

from converter.config import field, fixed, number, value
from converter.config_layers import FULL, SLIDING, layers_of, window_pattern
from converter.config_parts import Config, mlp
from converter.config_rope import rope
from converter.families import llama
from converter.rules import qkv

MODELS = "Qwen2, Qwen2.5, QwQ, dense"
ARCHITECTURE = "Qwen2ForCausalLM"

BIAS = qkv("self_attention.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias")
RULES = llama.decoder(*llama.ATTENTION[:2], BIAS, llama.ATTENTION[2], *llama.MLP)


def last_slide(config: Config) -> list[str]:
    """Return the types of layers of which those from `max_window_layers` on slide, if any do."""
    slide, layers = config.get("use_sliding_window"), layers_of(config)
    first = number("max_window_layers", config.get("max_window_layers", 28)) if slide else layers
    return [FULL if layer < first else SLIDING for layer in range(layers)]


def first_sliding(types: Sequence[str]) -> dict[str, int]:
    """Return the field by which the last layers slide, if any do."""
    return {"max_window_layers": types.index(SLIDING)} if SLIDING in types else {}


WINDOW = window_pattern(last_slide, default=4096, switch="use_sliding_window", pattern=first_sliding)
SIZES = (
    *llama.SIZES,
    *mlp("silu", gated=True),
    *llama.NO_BIAS,
    field("num_query_groups", "num_key_value_heads", default=value(32)),
    field("seq_length", "max_position_embeddings", default=value(32768)),
    rope("default", "yarn"),
    WINDOW,
)
CONFIG = (*SIZES, fixed(add_qkv_bias=True, qk_layernorm=False))
EXTRAS = llama.EXTRAS
