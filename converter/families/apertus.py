"""Apertus: Qwen 3's attention under other names, and xIELU, an activation with two weights in each layer."""

from converter.config import fixed
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, only, rms_norm, sizes
from converter.config_rope import BUILT_IN_ROPE, rope
from converter.families import llama, qwen3
from converter.rules import column_parallel, replicated

MODELS = "Apertus"
ARCHITECTURE = "ApertusForCausalLM"

RULES = llama.decoder(
    replicated("self_attention.linear_qkv.layer_norm_weight", "attention_layernorm.weight", "hidden"),
    *llama.ATTENTION[1:],
    *qwen3.NORMS,
    replicated("mlp.linear_fc1.layer_norm_weight", "feedforward_layernorm.weight", "hidden"),
    column_parallel("mlp.linear_fc1.weight", "mlp.up_proj.weight", "ffn", "hidden"),
    llama.MLP[2],
    *(replicated(f"mlp.activation_func.alpha_{sign}", f"mlp.act_fn.alpha_{sign}", 1) for sign in ("p", "n")),
)
ROPE = {"rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, **BUILT_IN_ROPE}

CONFIG = (
    *sizes(positions_default=65536),
    *dropouts(),
    *rms_norm(default=1e-5),
    *mlp("xielu", gated=False),
    fixed(add_qkv_bias=False, qk_layernorm=True),
    *llama.NO_BIAS,
    rope("default", "llama3", theta=12e6, default=ROPE),
    no_window("window_size"),
    only(attention_bias=False),
)
EXTRAS = (*llama.EXTRAS, "model.layers.{layer}.mlp.act_fn.beta", "model.layers.{layer}.mlp.act_fn.eps")
SMALL = {"head_dim": 8, "pad_token_id": 0}
PROVIDER = ("activation_func=xielu",)
