"""Llama 2, 3, 3.1, 3.2, and the models that copied their shape."""

from converter.config import (
    Config,
    activation,
    counts,
    field,
    fixed,
    flag,
    named,
    no_window,
    required,
    rope,
    switches,
    value,
)
from converter.model import Model
from converter.rules import Indices, Rule, gated_mlp, qkv, replicated, row_parallel, under, vocab_parallel

MODELS = "Llama 2, 3, 3.1, 3.2 and models of the same shape"
ARCHITECTURE = "LlamaForCausalLM"


def _untied(model: Model, _indices: Indices) -> bool:
    return not model.tied


def _biased(model: Model, _indices: Indices) -> bool:
    """megatron-core has one switch, `add_bias_linear`, for what Hugging Face switches separately."""
    return model.attention_bias or model.mlp_bias


def _plain_attention(model: Model, _indices: Indices) -> bool:
    return not model.attention_bias


def _plain_mlp(model: Model, _indices: Indices) -> bool:
    return not model.mlp_bias


def _heads(config: Config) -> int:
    return config["num_attention_heads"]


def _head_dim(config: Config) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


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
        vocab_parallel("output_layer.weight", "lm_head.weight", "hidden", when=_untied, tied_to="model.embed_tokens.weight"),
    )


RULES = decoder(
    *ATTENTION[:2],
    qkv("self_attention.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias", when=_biased, absent=_plain_attention),
    ATTENTION[2],
    replicated("self_attention.linear_proj.bias", "self_attn.o_proj.bias", "hidden", when=_biased, absent=_plain_attention),
    *MLP[:2],
    gated_mlp("mlp.linear_fc1.bias", "mlp.{gate,up}_proj.bias", "ffn", when=_biased, absent=_plain_mlp),
    MLP[2],
    replicated("mlp.linear_fc2.bias", "mlp.down_proj.bias", "hidden", when=_biased, absent=_plain_mlp),
)

SIZES = (
    required("num_layers", "num_hidden_layers"),
    required("hidden_size", "hidden_size"),
    required("ffn_hidden_size", "intermediate_size"),
    required("num_attention_heads", "num_attention_heads"),
    field("num_query_groups", "num_key_value_heads", default=_heads, null=_heads),
    field("kv_channels", "head_dim", default=_head_dim, null=_head_dim),
    required("vocab_size", "vocab_size"),
    field("seq_length", "max_position_embeddings", default=value(2048)),
    field("layernorm_epsilon", "rms_norm_eps", default=value(1e-6)),
    field("init_method_std", "initializer_range", default=value(0.02)),
    field("attention_dropout", "attention_dropout", default=value(0.0)),
    field("share_embeddings_and_output_weights", "tie_word_embeddings", default=value(False)),
    counts(layers="num_layers", hidden="hidden_size", heads="num_attention_heads", groups="num_query_groups",
           head_dim="kv_channels", ffn="ffn_hidden_size", vocab="vocab_size"),
    switches(tied="share_embeddings_and_output_weights"),
    named(attention_bias=False, mlp_bias=False),
    activation("silu"),
    fixed(normalization="RMSNorm", gated_linear_unit=True, position_embedding_type="rope", rotary_percent=1.0,
          hidden_dropout=0.0),
)  # fmt: skip

PLAIN_ATTENTION = fixed(add_qkv_bias=False, qk_layernorm=False)
DENSE = fixed(num_moe_experts=None)

CONFIG = (
    *SIZES,
    PLAIN_ATTENTION,
    DENSE,
    flag("add_bias_linear", "attention_bias", "mlp_bias"),
    rope("default", "linear", "llama3"),
    no_window("window_size"),
)

EXTRAS = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)
