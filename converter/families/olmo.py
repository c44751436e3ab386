"""OLMo 1: a LayerNorm without weights; Megatron's are 1, and its biases 0."""

from converter.config import fixed, flag, named, optional
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, sizes
from converter.config_rope import rope
from converter.families import llama
from converter.rules import Rule, always, replicated, under, with_bias

MODELS = "OLMo 1"
ARCHITECTURE = "OlmoForCausalLM"


def _norm(megatron: str, alias: str = "") -> tuple[Rule, Rule]:
    return with_bias(replicated(megatron, "", "hidden", absent=always, fill=1.0, alias=alias), fill=0.0)


LAYER = (
    *_norm("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    *with_bias(llama.ATTENTION[1], when=llama.biased),
    *with_bias(llama.ATTENTION[2], when=llama.biased),
    *_norm("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    *llama.MLP[1:],
    *(with_bias(rule, when=llama.biased, absent=always)[1] for rule in llama.MLP[1:]),
)
EMBEDDING, _, HEAD = llama.decoder()
RULES = (
    EMBEDDING,
    *under("decoder.layers.{layer}", "model.layers.{layer}", LAYER),
    *_norm("decoder.final_layernorm.weight"),
    HEAD,
)
CONFIG = (
    *sizes(),
    *dropouts(),
    fixed(normalization="LayerNorm", layernorm_epsilon=1e-5),
    *mlp("silu", gated=True),
    llama.PLAIN_ATTENTION,
    flag("add_bias_linear", "attention_bias"),
    named(mlp_bias=False),
    rope("default", "linear"),
    no_window("window_size"),
    optional("clip_qkv", "clip_qkv"),
)
EXTRAS = llama.EXTRAS
SMALL = {"clip_qkv": 0.5}
PROVIDER = ("clip_qkv",)
