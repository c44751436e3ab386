"""Gemma 3: Gemma 2 with norms of query and key, other rotary embeddings in layers that slide, and no caps."""

from converter.config import field, fixed, optional, value
from converter.config_layers import one_full_in, window_pattern
from converter.config_parts import trained_with
from converter.config_rope import rope_by_type
from converter.families import gemma2, llama, qwen3

MODELS = "Gemma 3, text"
ARCHITECTURE = "Gemma3ForCausalLM"

RULES = llama.decoder(*llama.ATTENTION, *qwen3.NORMS, gemma2.POST_NORMS[0], gemma2.MLP_NORM, *llama.MLP[1:], gemma2.POST_NORMS[1])
CONFIG = (
    *gemma2.SIZES,
    field("seq_length", "max_position_embeddings", default=value(131072)),
    optional("attn_logit_softcapping", "attn_logit_softcapping"),
    optional("final_logit_softcapping", "final_logit_softcapping"),
    fixed(add_qkv_bias=False, qk_layernorm=True, post_layernorms=True),
    rope_by_type("default", "linear", theta=1e6, sliding="rope_local_base_freq", sliding_theta=1e4),
    window_pattern(one_full_in(6), default=4096),
    trained_with(use_bidirectional_attention=False),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "query_pre_attn_scalar": 64,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    },
}  # fmt: skip
PROVIDER = ("post_layernorms", "sliding_rope")
