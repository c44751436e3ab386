"""Biases of query, key and value alone."""

from converter.config import fixed, no_window, rope
from converter.families import llama
from converter.rules import qkv

MODELS, ARCHITECTURE = "Qwen2 and 2.5", "Qwen2ForCausalLM"

RULES = llama.decoder(*llama.ATTENTION, qkv("self_attention.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias"), *llama.MLP)
CONFIG = (
    *llama.SIZES,
    llama.DENSE,
    rope("default"),
    no_window("window_size"),
    fixed(add_bias_linear=False, add_qkv_bias=True, qk_layernorm=False),
)
