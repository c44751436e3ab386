"""Hunyuan V1, dense: Llama, and a norm over each head of queries and keys after they are turned."""

from typing import Any

from converter.config import Config, Field, count, fixed, number
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, only, rms_norm, sizes
from converter.config_rope import rope, rope_numbers
from converter.families import llama
from converter.rules import replicated

MODELS = "Hunyuan V1, dense"
ARCHITECTURE = "HunYuanDenseV1ForCausalLM"

NORMS = (
    replicated("self_attention.q_layernorm.weight", "self_attn.query_layernorm.weight", "head_dim"),
    replicated("self_attention.k_layernorm.weight", "self_attn.key_layernorm.weight", "head_dim"),
)
RULES = llama.decoder(*llama.ATTENTION, *NORMS, *llama.MLP)
_ROPE = rope("default", "linear")


def _read_rope(config: Config) -> dict[str, Any]:
    """Read `dynamic` with `alpha`, which published models have, as transformers does: it enlarges the base, at any length."""
    numbers = rope_numbers(config)
    if numbers["rope_type"] != "dynamic" or not numbers.get("alpha"):
        return _ROPE.to_megatron(config)
    head = config.get("head_dim") or count(config, "hidden_size") // count(config, "num_attention_heads")
    base = numbers["rope_theta"] * number("alpha", numbers["alpha"]) ** (head / (head - 2))
    return _ROPE.to_megatron({"rope_theta": base})


BODY = (
    *sizes(),
    *dropouts(),
    *rms_norm(default=1e-5),
    fixed(add_qkv_bias=False, qk_layernorm=True, qk_layernorm_after_rope=True),
    *llama.NO_BIAS,
    Field(_read_rope, _ROPE.to_huggingface),
    no_window("window_size"),
    only(attention_bias=False),
)
CONFIG = (*BODY, *mlp("silu", gated=True))
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 16}
PROVIDER = ("qk_layernorm_after_rope",)
