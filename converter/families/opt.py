"""OPT: learned positions that begin at 2, ReLU, and biases. The 350M model, with norms after the branches, is another."""

from typing import Any

from converter.config import counts, fixed, named, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, only, sizes
from converter.families.bloom import normed
from converter.model import Model
from converter.rules import Rule, column_parallel, qkv, replicated, row_parallel, under, vocab_parallel

MODELS = "OPT, except 350M"
ARCHITECTURE = "OPTForCausalLM"


def _both(verb: Any, megatron: str, huggingface: str, rows: str, *columns: str) -> tuple[Rule, Rule]:
    """Return the rules of a layer's weight and of its bias."""
    of_bias = replicated if verb is row_parallel else verb
    first = () if verb is qkv else (rows,)
    weight = verb(f"{megatron}.weight", f"{huggingface}.weight", *first, *columns)
    return weight, of_bias(f"{megatron}.bias", f"{huggingface}.bias", *first)


LAYER = (
    *normed("self_attention.linear_qkv.layer_norm_", "self_attn_layer_norm"),
    *_both(qkv, "self_attention.linear_qkv", "self_attn.{q,k,v}_proj", "", "hidden"),
    *_both(row_parallel, "self_attention.linear_proj", "self_attn.out_proj", "hidden", "queries"),
    *normed("mlp.linear_fc1.layer_norm_", "final_layer_norm"),
    *_both(column_parallel, "mlp.linear_fc1", "fc1", "ffn", "hidden"),
    *_both(row_parallel, "mlp.linear_fc2", "fc2", "hidden", "ffn"),
)
RULES = (
    vocab_parallel("embedding.word_embeddings.weight", "model.decoder.embed_tokens.weight", "hidden"),
    replicated("embedding.position_embeddings.weight", "model.decoder.embed_positions.weight", "positions", "hidden"),
    *under("decoder.layers.{layer}", "model.decoder.layers.{layer}", LAYER),
    *normed("decoder.final_layernorm.", "model.decoder.final_layer_norm"),
)
ROOTS = ("model.decoder.", "decoder.", "")


def _positions(model: Model) -> int:
    return model.longest + 2


CONFIG = (
    *sizes(groups="", head_dim="", ffn="ffn_dim", ffn_default=value(3072), tied=True),
    counts(longest="seq_length"),
    named(positions=_positions),
    *dropouts(hidden="dropout", default=0.1, attention_default=0.0, elsewhere=("layerdrop",)),
    *mlp("relu", "gelu", gated=False, huggingface="activation_function"),
    fixed(normalization="LayerNorm", layernorm_epsilon=1e-5, add_bias_linear=True, add_qkv_bias=False, qk_layernorm=False,
          position_embedding_type="learned_absolute", position_offset=2),
    no_window("window_size"),
    only(do_layer_norm_before=True, _remove_final_layer_norm=False, enable_bias=True, layer_norm_elementwise_affine=True),
)  # fmt: skip
SMALL = {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}
PROVIDER = ("position_offset",)
