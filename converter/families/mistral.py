"""Mistral: Llama's weights without biases, and a sliding window over the attention."""

from converter.config import Field, agreeing, field, value
from converter.config_layers import window
from converter.config_parts import mlp
from converter.config_rope import rope
from converter.families import llama

MODELS = "Mistral 7B, Nemo and models of the same shape"
ARCHITECTURE = "MistralForCausalLM"

RULES = llama.RULES

SIZES = (
    *llama.SIZES,
    field("num_query_groups", "num_key_value_heads", default=value(8)),
    field("seq_length", "max_position_embeddings", default=value(4096 * 32)),
    rope("default", "linear", "llama3", "yarn"),
    *llama.NO_BIAS,
    Field(lambda _config: {}, lambda config: agreeing(config, {"exact_sequence_length": None})),  # Ministral 3 has one
)

CONFIG = (*SIZES, *mlp("silu", gated=True), llama.PLAIN_ATTENTION, window("window_size", "sliding_window", default=4096))

EXTRAS: tuple[str, ...] = llama.EXTRAS
SMALL = {"sliding_window": 8}
