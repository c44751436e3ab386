"""GPT-BigCode (StarCoder 1): GPT-2 with linear layers stored as usual, and one key and value for all heads.

Rows of `c_attn` are in Megatron's order: all queries, the key, the value, or with `multi_query: false` head by head.
"""

from typing import Any

from converter.config import Config, Field, count, named
from converter.config_parts import mlp
from converter.families import gpt2
from converter.rules import column_parallel, row_parallel, under, with_bias
from formats.errors import UserError

MODELS = "StarCoder, SantaCoder in transformers' form"
ARCHITECTURE = "GPTBigCodeForCausalLM"

LAYER = (
    *gpt2.NORMS[0],
    *with_bias(column_parallel("self_attention.linear_qkv.weight", "attn.c_attn.weight", "fused", "hidden")),
    *with_bias(row_parallel("self_attention.linear_proj.weight", "attn.c_proj.weight", "hidden", "queries")),
    *gpt2.NORMS[1],
    *with_bias(column_parallel("mlp.linear_fc1.weight", "mlp.c_fc.weight", "ffn", "hidden")),
    *with_bias(row_parallel("mlp.linear_fc2.weight", "mlp.c_proj.weight", "hidden", "ffn")),
)
RULES = (*gpt2.OUTSIDE[:2], *under("decoder.layers.{layer}", "transformer.h.{layer}", LAYER), *gpt2.OUTSIDE[2:])


def _groups(config: Config) -> dict[str, Any]:
    return {"num_query_groups": 1 if config.get("multi_query", True) else count(config, "n_head")}


def _multi_query(config: Config) -> dict[str, Any]:
    groups, heads = config.get("num_query_groups"), config.get("num_attention_heads")
    if groups not in (1, heads):
        raise UserError(f"`num_query_groups` is `{groups}`; models of this family have 1, or one for each of the `{heads}` heads")
    return {"multi_query": groups == 1}


GROUPS = Field(_groups, _multi_query, lambda sizes: {"groups": sizes.megatron["num_query_groups"]})
CONFIG = (
    *gpt2.SIZES,
    GROUPS,
    named(fused=lambda model: model.queries + 2 * model.keys),
    *mlp("gelu_pytorch_tanh", "gelu", "relu", "silu", gated=False, huggingface="activation_function"),
)
EXTRAS = gpt2.EXTRAS
ROOTS = gpt2.ROOTS
SMALL = {"n_inner": 96, "num_key_value_heads": 1}
