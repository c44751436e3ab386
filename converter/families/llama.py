"""Llama 2, 3, 3.1, 3.2, and the models that copied their shape."""

from converter.config import fixed, flag, named
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, rms_norm, sizes
from converter.config_rope import rope
from converter.model import Model
from converter.rules import Indices, Rule, gated_mlp, qkv, replicated, row_parallel, under, vocab_parallel

MODELS = "Llama 2, 3, 3.1, 3.2 and models of the same shape"
ARCHITECTURE = "LlamaForCausalLM"


def untied(model: Model, _indices: Indices) -> bool:
    """Return whether the model has an output layer of its own."""
    return not model.tied


def biased(model: Model, _indices: Indices) -> bool:
    """Return whether any linear layer has biases: megatron-core has one switch, `add_bias_linear`, Hugging Face two."""
    return model.attention_bias or model.mlp_bias


def plain_attention(model: Model, _indices: Indices) -> bool:
    """Return whether attention has no biases in Hugging Face."""
    return not model.attention_bias


def plain_mlp(model: Model, _indices: Indices) -> bool:
    """Return whether the feed-forward layer has no biases in Hugging Face."""
    return not model.mlp_bias


ATTENTION = (
    replicated("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "hidden", alias="input_layernorm.weight"),
    qkv("self_attention.linear_qkv.weight", "self_attn.{q,k,v}_proj.weight", "hidden"),
    row_parallel("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", "queries"),
)
MLP = (
    replicated("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "hidden", alias="pre_mlp_layernorm.weight"),
    gated_mlp("mlp.linear_fc1.weight", "mlp.{gate,up}_proj.weight", "ffn", "hidden"),
    row_parallel("mlp.linear_fc2.weight", "mlp.down_proj.weight", "hidden", "ffn"),
)


def decoder(*layer: Rule) -> tuple[Rule, ...]:
    """Return the rules of a model whose layers have these."""
    return (
        vocab_parallel("embedding.word_embeddings.weight", "model.embed_tokens.weight", "hidden"),
        *under("decoder.layers.{layer}", "model.layers.{layer}", layer),
        replicated("decoder.final_layernorm.weight", "model.norm.weight", "hidden"),
        vocab_parallel("output_layer.weight", "lm_head.weight", "hidden", when=untied, tied_to="model.embed_tokens.weight"),
    )


BIASED_ATTENTION = (
    *ATTENTION[:2],
    qkv("self_attention.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias", when=biased, absent=plain_attention),
    ATTENTION[2],
    replicated("self_attention.linear_proj.bias", "self_attn.o_proj.bias", "hidden", when=biased, absent=plain_attention),
)
BIASED_MLP = (
    *MLP[:2],
    gated_mlp("mlp.linear_fc1.bias", "mlp.{gate,up}_proj.bias", "ffn", when=biased, absent=plain_mlp),
    MLP[2],
    replicated("mlp.linear_fc2.bias", "mlp.down_proj.bias", "hidden", when=biased, absent=plain_mlp),
)
LAYER = (*BIASED_ATTENTION, *BIASED_MLP)
RULES = decoder(*LAYER)

SIZES = (*sizes(), *dropouts(), *rms_norm())
PLAIN_ATTENTION = fixed(add_qkv_bias=False, qk_layernorm=False)
NO_BIAS = (fixed(add_bias_linear=False), named(attention_bias=False, mlp_bias=False))

CONFIG = (
    *SIZES,
    *mlp("silu", gated=True),
    PLAIN_ATTENTION,
    flag("add_bias_linear", "attention_bias", "mlp_bias"),
    rope("default", "linear", "llama3", "yarn", "dynamic"),
    no_window("window_size"),
)

EXTRAS = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)
PROVIDER = ("rope_parameters", "exact_sequence_length")
