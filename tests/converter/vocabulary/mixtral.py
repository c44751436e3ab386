"""Experts that are separate on Hugging Face's side."""

from converter.config import activation, fixed
from converter.config_layers import window
from converter.config_parts import routed
from converter.families import llama, mistral
from converter.rules import gated_mlp, replicated, row_parallel

MODELS, ARCHITECTURE = "Mixtral 8x7B and 8x22B", "MixtralForCausalLM"

EXPERTS = "block_sparse_moe.experts.{expert}"
MOE = (
    replicated("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
    replicated("mlp.router.weight", "block_sparse_moe.gate.weight", "experts", "hidden"),
    gated_mlp("mlp.experts.{expert}.linear_fc1.weight", EXPERTS + ".{w1,w3}.weight", "moe_ffn", "hidden"),
    row_parallel("mlp.experts.{expert}.linear_fc2.weight", EXPERTS + ".w2.weight", "hidden", "moe_ffn"),
)
SMALL = {"num_local_experts": 4, "num_experts_per_tok": 2}
RULES = llama.decoder(*llama.ATTENTION, *MOE)
CONFIG = (
    *mistral.SIZES,
    activation("silu"),
    fixed(gated_linear_unit=True),
    llama.PLAIN_ATTENTION,
    window("window_size", "sliding_window", default=None),
    *routed(experts="num_local_experts", topk="num_experts_per_tok", ffn="intermediate_size"),
)
