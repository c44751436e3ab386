"""Gemma: Llama with norms that multiply by 1 + their weight, GELU, and embeddings multiplied by the root of their width."""

from converter.config import Field, activation, agreeing, fixed, flag, named
from converter.config_layers import no_window
from converter.config_parts import Config, count, dropouts, multipliers, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama

MODELS = "Gemma 1, CodeGemma"
ARCHITECTURE = "GemmaForCausalLM"

RULES = llama.RULES


def _by_width(config: Config) -> dict[str, float]:
    return {"mup_embedding_mult": count(config, "hidden_size") ** 0.5}


WIDTH = multipliers(embedding=Field(_by_width, lambda config: agreeing(config, _by_width(config))))
"""Embeddings are multiplied by the root of their width. transformers rounds it to the weights' dtype first: 55.5 for √3072 in
bf16."""

_TANH = activation("gelu_pytorch_tanh")


def _tanh(config: Config) -> dict[str, str]:
    """Take `gelu`, as the first releases say, for GELU by tanh, as transformers does."""
    return _TANH.to_megatron({**config, "hidden_act": "gelu_pytorch_tanh"} if config.get("hidden_act") == "gelu" else config)


CONFIG = (
    *sizes(groups_default=16, head_dim_default=256, positions_default=8192, tied=True),
    *dropouts(),
    *rms_norm(zero_centered=True),
    Field(_tanh, _TANH.to_huggingface),
    fixed(gated_linear_unit=True, num_moe_experts=None, add_qkv_bias=False, qk_layernorm=False),
    flag("add_bias_linear", "attention_bias"),
    named(mlp_bias=False),
    *WIDTH,
    rope("default", "linear", "llama3", "yarn"),
    no_window("window_size"),
)
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 16}
