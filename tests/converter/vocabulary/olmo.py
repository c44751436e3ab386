"""Norms without weights: Megatron's are 1, and their biases 0."""

from converter.config_layers import no_window
from converter.config_parts import mlp
from converter.config_rope import rope
from converter.families import llama
from converter.rules import always, replicated, under, vocab_parallel

MODELS, ARCHITECTURE = "OLMo 1", "OlmoForCausalLM"


def norm(name):
    yield replicated(f"{name}weight", "", "hidden", absent=always, fill=1.0)
    yield replicated(f"{name}bias", "", "hidden", absent=always)


LAYER = (
    *norm("self_attention.linear_qkv.layer_norm_"),
    *llama.ATTENTION[1:],
    *norm("mlp.linear_fc1.layer_norm_"),
    *llama.MLP[1:],
)
BODY = llama.decoder()
RULES = (
    vocab_parallel("embedding.word_embeddings.weight", "model.embed_tokens.weight", "hidden"),
    *under("decoder.layers.{layer}", "model.layers.{layer}", LAYER),
    *norm("decoder.final_layernorm."),
    BODY[-1],
)
CONFIG = (
    *llama.SIZES,
    *mlp("silu", gated=True),
    rope("default"),
    no_window("window_size"),
    *llama.NO_BIAS,
)
WEIGHTS_ONLY = "a LayerNorm without weights"
