"""Query, key and value in one tensor, one after another; gate and up projection in one."""

from converter.config_layers import no_window
from converter.config_parts import mlp
from converter.config_rope import rope
from converter.families import llama
from converter.rules import gated_mlp, qkv

MODELS, ARCHITECTURE = "Phi-3 and 4", "Phi3ForCausalLM"

RULES = llama.decoder(
    llama.ATTENTION[0],
    qkv("self_attention.linear_qkv.weight", "self_attn.qkv_proj.weight", "hidden"),
    llama.ATTENTION[2],
    llama.MLP[0],
    gated_mlp("mlp.linear_fc1.weight", "mlp.gate_up_proj.weight", "ffn", "hidden"),
    llama.MLP[2],
)
CONFIG = (*llama.SIZES, *mlp("silu", gated=True), rope("default"), no_window("window_size"), *llama.NO_BIAS)
