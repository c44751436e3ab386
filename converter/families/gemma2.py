"""Gemma 2: Gemma, norms after each branch too, caps of scores and of logits, and every second layer slides."""

from converter.config import derived, field, optional, value
from converter.config_layers import one_full_in, window_pattern
from converter.config_parts import dropouts, fixed, mlp, only, rms_norm, sizes
from converter.config_rope import rope
from converter.families import gemma, llama
from converter.rules import replicated

MODELS = "Gemma 2"
ARCHITECTURE = "Gemma2ForCausalLM"

POST_NORMS = (
    replicated("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
    replicated("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm.weight", "hidden"),
)
MLP_NORM = replicated("mlp.linear_fc1.layer_norm_weight", "pre_feedforward_layernorm.weight", "hidden")
RULES = llama.decoder(*llama.ATTENTION, POST_NORMS[0], MLP_NORM, *llama.MLP[1:], POST_NORMS[1])


SIZES = (
    *sizes(positions_default=8192, tied=True),
    field("kv_channels", "head_dim", default=value(256)),
    field("num_query_groups", "num_key_value_heads", default=value(4)),
    *dropouts(),
    *rms_norm(zero_centered=True),
    *mlp("gelu_pytorch_tanh", gated=True, huggingface="hidden_activation"),
    *gemma.WIDTH,
    derived("softmax_scale", "query_pre_attn_scalar", lambda scalar: scalar**-0.5, lambda scale: scale**-2, default=256),
    *llama.NO_BIAS,
    only(attention_bias=False),
)
CAPS = (
    optional("attn_logit_softcapping", "attn_logit_softcapping", default=50.0),
    optional("final_logit_softcapping", "final_logit_softcapping", default=30.0),
)
CONFIG = (
    *SIZES,
    *CAPS,
    llama.PLAIN_ATTENTION,
    fixed(post_layernorms=True),
    rope("default"),
    window_pattern(one_full_in(2), default=4096),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 64, "sliding_window": 8,
}  # fmt: skip
PROVIDER = ("post_layernorms", "attn_logit_softcapping", "final_logit_softcapping")
