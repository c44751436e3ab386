"""Qwen3 with experts: Qwen3's attention, and a mixture of experts in place of some layers' feed-forward part."""

from converter.config import field, fixed, value
from converter.config_experts import SOFTMAX, auxiliary_loss, each_nth
from converter.config_layers import window
from converter.config_nested import renamed
from converter.config_parts import only, routed
from converter.config_rope import rope
from converter.families import llama, mixtral, qwen3

MODELS = "Qwen3 30B-A3B, 235B-A22B, Coder"
ARCHITECTURE = "Qwen3MoeForCausalLM"

RULES = llama.decoder(*llama.ATTENTION, *qwen3.NORMS, *mixtral.mixed(llama.MLP, mixtral.moe()))
EXPERTS = renamed(
    routed(
        experts="num_experts",
        topk="num_experts_per_tok",
        ffn="moe_intermediate_size",
        renormalized="norm_topk_prob",
        absent=False,
    ),
    num_local_experts="num_experts",  # as transformers 5 writes it
)
CONFIG = (
    *llama.SIZES,
    *mixtral.GATED,
    *llama.NO_BIAS,
    field("num_query_groups", "num_key_value_heads", default=value(4)),
    field("seq_length", "max_position_embeddings", default=value(32768)),
    rope("default", "yarn"),
    window("window_size", "sliding_window", default=4096, switch="use_sliding_window"),
    EXPERTS,
    SOFTMAX,
    each_nth(),
    auxiliary_loss(),
    only(attention_bias=False),
    fixed(add_qkv_bias=False, qk_layernorm=True),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True,
    "mlp_only_layers": [1],
}  # fmt: skip
