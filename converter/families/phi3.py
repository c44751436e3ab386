"""Phi-3 and Phi-4: Llama with query, key and value in one tensor, gate and up in another; `longrope` for long contexts."""

from converter.config_layers import window
from converter.config_parts import dropouts, mlp, only, rms_norm, sizes
from converter.config_rope import partial_rotary, rope
from converter.families import llama
from converter.rules import gated_mlp, qkv

MODELS = "Phi-3, 3.5-mini, Phi-4 and Phi-4-mini; long contexts up to the original length"
ARCHITECTURE = "Phi3ForCausalLM"

RULES = llama.decoder(
    llama.ATTENTION[0],
    qkv("self_attention.linear_qkv.weight", "self_attn.qkv_proj.weight", "hidden"),
    llama.ATTENTION[2],
    llama.MLP[0],
    gated_mlp("mlp.linear_fc1.weight", "mlp.gate_up_proj.weight", "ffn", "hidden"),
    llama.MLP[2],
)
CONFIG = (
    *sizes(head_dim="", positions_default=4096),
    *dropouts(hidden="resid_pdrop"),
    *rms_norm(default=1e-5),
    *mlp("silu", gated=True),
    llama.PLAIN_ATTENTION,
    *llama.NO_BIAS,
    rope("default", "longrope", partial=partial_rotary(1.0)),
    window("window_size", "sliding_window", default=None),
    only(attention_bias=False),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "original_max_position_embeddings": 64,
    "sliding_window": 8,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [1.0, 4.0, 16.0],
    },
}
PROVIDER = ("rope_parameters", "exact_sequence_length")
