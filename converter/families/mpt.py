"""MPT: ALiBi, LayerNorm without bias, no biases; query, key and value one after another.

`alibi_bias_max` is read as MosaicML's own code does; transformers takes 8 whatever it is.
"""

from collections.abc import Iterator
from typing import Any, cast

from converter.config import Config, Field, fixed, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, layer_norm, only, sizes
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


def _attention(config: Config) -> Config:
    found: Any = config.get("attn_config") or {}
    return cast("Config", found)


def _read_attention(config: Config) -> dict[str, Any]:
    attention = _attention(config)
    return {
        "position_embedding_type": "alibi",
        "alibi": {"bias_max": float(attention.get("alibi_bias_max", 8))},
        "attention_dropout": attention.get("attn_pdrop", 0.0),
        "softmax_scale": attention.get("softmax_scale"),
        "clip_qkv": attention.get("clip_qkv"),
    }


def _write_attention(config: Config) -> dict[str, Any]:
    slopes: Any = config.get("alibi") or {}
    bias_max = slopes.get("bias_max", 8.0)
    return {
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": int(bias_max) if float(bias_max).is_integer() else bias_max,
            "attn_pdrop": config.get("attention_dropout", 0.0),
            "softmax_scale": config.get("softmax_scale"),
            "clip_qkv": config.get("clip_qkv"),
        }
    }


CONFIG = (
    *sizes(layers="n_layers", hidden="d_model", heads="n_heads", groups="", head_dim="", ffn="n_inner", ffn_default=value(4),
           positions="max_seq_len", tied=True),
    four_times("d_model"),
    *dropouts(attention="", hidden="resid_pdrop"),
    *layer_norm("layer_norm_epsilon"),
    fixed(activation_func="gelu", gated_linear_unit=False, num_moe_experts=None, add_bias_linear=False, add_qkv_bias=False,
          qk_layernorm=False),
    Field(_read_attention, _write_attention),
    no_window("window_size"),
    only(expansion_ratio=4, logit_scale=None, no_bias=True),
)  # fmt: skip
SMALL = {"num_attention_heads": 6, "hidden_size": 48}
PROVIDER = ("alibi",)
