"""MPT: ALiBi, LayerNorm without bias, no biases; query, key and value one after another.

transformers takes 8 for `alibi_bias_max` whatever it says, and MosaicML's own code what it says: another is not trained.
"""

from collections.abc import Iterator
from typing import Any

from converter.config import Config, Field, fixed, number, object_of, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, layer_norm, only, sizes, trained_with
from converter.families.bloom import four_times
from converter.rules import Rule, always, column_parallel, qkv, replicated, row_parallel, under, vocab_parallel

MODELS = "MPT 7B and 30B"
ARCHITECTURE = "MptForCausalLM"


def weighted(megatron: str, huggingface: str) -> Iterator[Rule]:
    """Yield the rules of a LayerNorm that has no bias. Megatron's names go on with `weight` and `bias`."""
    yield replicated(f"{megatron}weight", f"{huggingface}.weight", "hidden")
    yield replicated(f"{megatron}bias", "", "hidden", absent=always)


LAYER = (
    *weighted("self_attention.linear_qkv.layer_norm_", "norm_1"),
    qkv("self_attention.linear_qkv.weight", "attn.Wqkv.weight", "hidden"),
    row_parallel("self_attention.linear_proj.weight", "attn.out_proj.weight", "hidden", "queries"),
    *weighted("mlp.linear_fc1.layer_norm_", "norm_2"),
    column_parallel("mlp.linear_fc1.weight", "ffn.up_proj.weight", "ffn", "hidden"),
    row_parallel("mlp.linear_fc2.weight", "ffn.down_proj.weight", "hidden", "ffn"),
)
RULES = (
    vocab_parallel("embedding.word_embeddings.weight", "transformer.wte.weight", "hidden"),
    *under("decoder.layers.{layer}", "transformer.blocks.{layer}", LAYER),
    *weighted("decoder.final_layernorm.", "transformer.norm_f"),
)


_BIAS_MAX = 8


def _read_attention(config: Config) -> dict[str, Any]:
    attention = object_of(config, "attn_config")
    drops = {"attn_pdrop": attention.get("attn_pdrop"), **{name: config.get(name) for name in ("resid_pdrop", "emb_pdrop")}}
    bias_max = number("alibi_bias_max", attention.get("alibi_bias_max", _BIAS_MAX))
    return {
        "position_embedding_type": "alibi",
        "alibi": {"bias_max": float(_BIAS_MAX)},
        "alibi_bias_max": None if bias_max == _BIAS_MAX else bias_max,
        "dropouts": {name: probability for name, probability in drops.items() if probability} or None,
        "softmax_scale": attention.get("softmax_scale"),
        "clip_qkv": attention.get("clip_qkv") or None,
    }


def _write_attention(config: Config) -> dict[str, Any]:
    drops = object_of(config, "dropouts")
    bias_max = config.get("alibi_bias_max")
    attention = {
        "alibi": True,
        "alibi_bias_max": _BIAS_MAX if bias_max is None else bias_max,
        "attn_pdrop": drops.get("attn_pdrop", 0),  # a whole number: transformers refuses 0.0
        "softmax_scale": config.get("softmax_scale"),
        "clip_qkv": config.get("clip_qkv"),
    }
    return {"attn_config": attention, **{name: drops.get(name, 0.0) for name in ("resid_pdrop", "emb_pdrop")}}


CONFIG = (
    *sizes(layers="n_layers", hidden="d_model", heads="n_heads", groups="", head_dim="", ffn="n_inner", ffn_default=value(4),
           positions="max_seq_len", tied=True),
    four_times("d_model"),
    *dropouts(attention=""),
    *layer_norm("layer_norm_epsilon"),
    fixed(activation_func="gelu", gated_linear_unit=False, num_moe_experts=None, add_bias_linear=False, add_qkv_bias=False,
          qk_layernorm=False),
    Field(_read_attention, _write_attention),
    no_window("window_size"),
    only(expansion_ratio=4, no_bias=True),
    trained_with(logit_scale=None),
)  # fmt: skip
SMALL = {"num_attention_heads": 6, "hidden_size": 48}
PROVIDER = ("alibi", "clip_qkv")
