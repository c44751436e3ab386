"""What no small model of transformers has: prediction layers, halves of layers that count, an axis of size 1, other roots."""

from converter.config import activation, fixed, named
from converter.config_parts import dimension, routed
from converter.config_rope import rope
from converter.families import llama
from converter.rules import copy_of, gated_mlp, replicated, row_parallel, under

MODELS, ARCHITECTURE = "A model for tests", "MadeUpForCausalLM"


def dense(_model, indices):
    return indices["layer"] == 0


def sparse(_model, indices):
    return indices["layer"] > 0


MOE = (
    replicated("mlp.router.expert_bias", "moe.bias", "experts", huggingface_shape=(1, "experts"), keep_dtype="fp32"),
    gated_mlp("mlp.experts.{expert}.linear_fc1.weight", "moe.{expert}.gate_up.weight", "moe_ffn", "hidden"),
    row_parallel("mlp.experts.{expert}.linear_fc2.weight", "moe.{expert}.down.weight", "hidden", "moe_ffn"),
)
HALVES = (
    *under("decoder.layers.{layer}", "model.layers.{mixer}", llama.ATTENTION),
    *under("decoder.layers.{layer}", "model.layers.{mlp}", llama.MLP, when=dense),
    *under("decoder.layers.{layer}", "model.layers.{mlp}", MOE, when=sparse),
)
MTP = (
    replicated("eh_proj.weight", "eh_proj.weight", "hidden", "twice"),
    *under("transformer_layer", "block", (*llama.ATTENTION, *MOE)),
)
BODY = llama.decoder()
RULES = (
    BODY[0],
    *HALVES,
    BODY[1],
    *under("mtp.layers.{mtp}", "model.layers.{after}", MTP),
    BODY[2],
    copy_of("model.layers.{after}.embed_tokens.weight", tied_to="model.embed_tokens.weight"),
)
CONFIG = (
    *llama.SIZES,
    activation("silu"),
    rope("default"),
    fixed(add_bias_linear=False),
    *routed(experts="num_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size"),
    *dimension("mtp", "num_nextn_predict_layers", megatron="mtp_num_layers"),
    named(stacked=False, twice=lambda model: 2 * model.hidden),
)
ROOTS = ("model.", "language_model.model.", "model.language_model.")
PASSTHROUGH_PREFIXES = ("vision_tower.",)
