"""Bloom: ALiBi, a LayerNorm after the embedding, and biases; query, key and value are stored in Megatron's order."""

from collections.abc import Iterator
from typing import Any

from converter.config import Config, Field, agreeing, count, fixed, named, value
from converter.config_layers import no_window
from converter.config_nested import renamed
from converter.config_parts import dropouts, layer_norm, sizes, trained_with
from converter.model import Model
from converter.rules import Rule, column_parallel, replicated, row_parallel, under, vocab_parallel

MODELS = "Bloom and Bloomz"
ARCHITECTURE = "BloomForCausalLM"


def normed(megatron: str, huggingface: str) -> Iterator[Rule]:
    """Yield the rules of a norm's weight and bias. Megatron's names go on with `weight` and `bias`."""
    for kind in ("weight", "bias"):
        yield replicated(f"{megatron}{kind}", f"{huggingface}.{kind}", "hidden")


def with_bias(rule: Rule) -> Iterator[Rule]:
    """Yield the rule of a layer's weight, and that of its bias."""
    yield rule
    first = (rule.parts[0][0],)
    bias = column_parallel if rule.partition_dim == 0 else replicated
    yield bias(rule.megatron.replace("weight", "bias"), rule.huggingface.replace("weight", "bias"), *first)


LAYER = (
    *normed("self_attention.linear_qkv.layer_norm_", "input_layernorm"),
    *with_bias(
        column_parallel("self_attention.linear_qkv.weight", "self_attention.query_key_value.weight", "fused_qkv", "hidden")
    ),
    *with_bias(row_parallel("self_attention.linear_proj.weight", "self_attention.dense.weight", "hidden", "queries")),
    *normed("mlp.linear_fc1.layer_norm_", "post_attention_layernorm"),
    *with_bias(column_parallel("mlp.linear_fc1.weight", "mlp.dense_h_to_4h.weight", "ffn", "hidden")),
    *with_bias(row_parallel("mlp.linear_fc2.weight", "mlp.dense_4h_to_h.weight", "hidden", "ffn")),
)
RULES = (
    vocab_parallel("embedding.word_embeddings.weight", "transformer.word_embeddings.weight", "hidden"),
    *normed("embedding.layernorm.", "transformer.word_embeddings_layernorm"),
    *under("decoder.layers.{layer}", "transformer.h.{layer}", LAYER),
    *normed("decoder.final_layernorm.", "transformer.ln_f"),
)
ROOTS = ("transformer.", "")


def four_times(hidden: str) -> Field:
    """Return the field of a feed-forward layer of 4 × the hidden size, whose name in `config.json` is given."""

    def read(config: Config) -> dict[str, Any]:
        return {"ffn_hidden_size": 4 * count(config, hidden)}

    return Field(read, lambda config: agreeing(config, {"ffn_hidden_size": 4 * count(config, "hidden_size")}))


def fused_qkv(model: Model) -> int:
    """Return the rows of query, key and value together."""
    return model.queries + 2 * model.keys


FIELDS = (
    *sizes(layers="n_layer", heads="n_head", groups="", head_dim="", ffn="n_inner", ffn_default=value(4),
           positions="seq_length", tied=True),
    four_times("hidden_size"),
    named(fused_qkv=fused_qkv),
    *dropouts(hidden="hidden_dropout"),
    *layer_norm("layer_norm_epsilon"),
    fixed(activation_func="fast_gelu", gated_linear_unit=False, num_moe_experts=None, add_bias_linear=True, add_qkv_bias=False,
          qk_layernorm=False, position_embedding_type="alibi", alibi={"bias_max": 8.0}, embedding_layernorm=True),
    no_window("window_size"),
    trained_with(apply_residual_connection_post_layernorm=False),
)  # fmt: skip
CONFIG = (renamed(FIELDS, n_embed="hidden_size", num_attention_heads="n_head", num_hidden_layers="n_layer"),)
"""Published models have the other names."""

SMALL = {"num_attention_heads": 6, "hidden_size": 48}
PROVIDER = ("alibi", "embedding_layernorm")
