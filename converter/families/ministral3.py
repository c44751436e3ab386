"""Ministral 3: Mistral with YaRN, whose queries grow with the logarithm of their position beyond the original length."""

from typing import Any

from converter.config import Field, object_of
from converter.config_layers import window
from converter.config_parts import OTHERS, Config, dropouts, mlp, rms_norm, sizes, trained_with
from converter.config_rope import rope, rope_numbers, signed
from converter.families import llama

MODELS = "Ministral 3, the language model alone"
ARCHITECTURE = "Ministral3ForCausalLM"

RULES = llama.RULES

ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
BETA = "llama_4_scaling_beta"
_YARN = rope("default", "yarn", theta=1e6, default=ROPE)


def _read(config: Config) -> dict[str, Any]:
    numbers = rope_numbers(config, theta=1e6, default=ROPE)
    beta = signed(BETA, numbers.get(BETA))
    exact = numbers.get("original_max_position_embeddings") if beta else None
    other = {} if beta in (None, 0) else trained_with(**{BETA: ROPE[BETA]}).to_megatron(numbers)
    return {**_YARN.to_megatron(config), "exact_sequence_length": exact, **other}


def _write(config: Config) -> dict[str, Any]:
    (name, numbers), *_ = _YARN.to_huggingface(config).items()
    usual = ROPE[BETA] if config.get("exact_sequence_length") else 0.0
    beta = object_of(config, OTHERS).get(BETA, usual)
    return {name: {**numbers, BETA: beta} if numbers["rope_type"] == "yarn" else numbers}


CONFIG = (
    *sizes(groups_default=8, head_dim_default=128, positions_default=262144),
    *dropouts(),
    *rms_norm(default=1e-5),
    *mlp("silu", gated=True),
    *llama.NO_BIAS,
    llama.PLAIN_ATTENTION,
    Field(_read, _write),
    window("window_size", "sliding_window", default=None),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "head_dim": 8,
    "sliding_window": 16,
    "rope_parameters": {**ROPE, "factor": 8.0, "original_max_position_embeddings": 32, "mscale": 0.7},
}
PROVIDER = ("exact_sequence_length",)
