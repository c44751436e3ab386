"""Granite with experts: Granite's multipliers, and all experts of a layer in two tensors."""

from converter.config import fixed
from converter.config_experts import SOFTMAX, auxiliary_loss
from converter.config_layers import no_window
from converter.config_parts import only, routed
from converter.config_rope import rope
from converter.families import granite, llama, mixtral
from converter.rules import gated_mlp, replicated, row_parallel

MODELS = "Granite 3 1B-A400M and 3B-A800M, PowerMoE"
ARCHITECTURE = "GraniteMoeForCausalLM"

EXPERTS = (
    mixtral.moe()[0],
    replicated("mlp.router.weight", "block_sparse_moe.router.layer.weight", "experts", "hidden"),
    gated_mlp("mlp.experts.{expert}.linear_fc1.weight", "block_sparse_moe.input_linear.weight", "moe_ffn", "hidden"),
    row_parallel("mlp.experts.{expert}.linear_fc2.weight", "block_sparse_moe.output_linear.weight", "hidden", "moe_ffn"),
)
RULES = llama.decoder(*llama.ATTENTION, *EXPERTS)
CONFIG = (
    *llama.SIZES,
    *mixtral.GATED,
    llama.PLAIN_ATTENTION,
    *llama.NO_BIAS,
    only(attention_bias=False),
    rope("default", "linear", "llama3", "yarn", "dynamic"),
    no_window("window_size"),
    *granite.MULTIPLIERS,
    *routed(experts="num_local_experts", topk="num_experts_per_tok", ffn="intermediate_size"),
    fixed(moe_router_pre_softmax=False),
    SOFTMAX,
    auxiliary_loss(),
)
EXTRAS = llama.EXTRAS
SMALL = {**granite.SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}
PROVIDER = granite.PROVIDER
