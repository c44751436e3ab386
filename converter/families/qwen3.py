"""Qwen3: Qwen2 without biases, and a norm over each head of queries and keys."""

from converter.config import field, fixed, value
from converter.config_parts import only
from converter.families import llama, qwen2
from converter.rules import replicated

MODELS = "Qwen3, dense"
ARCHITECTURE = "Qwen3ForCausalLM"

NORMS = tuple(
    replicated(f"self_attention.{part}_layernorm.weight", f"self_attn.{part}_norm.weight", "head_dim") for part in ("q", "k")
)
RULES = llama.decoder(*llama.ATTENTION, *NORMS, *llama.MLP)
CONFIG = (
    *qwen2.SIZES,
    field("kv_channels", "head_dim", default=value(128)),
    only(attention_bias=False),
    fixed(add_qkv_bias=False, qk_layernorm=True),
)
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 16}
