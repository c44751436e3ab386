"""GPT-NeoX, Pythia: both branches read the layer's input, each through its own norm; query, key and value in one tensor."""

from typing import Any

from converter.config import Config, Field, fixed, named
from converter.config_layers import no_window
from converter.config_parts import dropouts, layer_norm, mlp, sizes
from converter.config_rope import partial_rotary, rope
from converter.families.llama import untied
from converter.model import Model
from converter.rules import Indices, Options, Rule, column_parallel, replicated, row_parallel, under, vocab_parallel

MODELS = "GPT-NeoX, Pythia, Dolly 2, RedPajama-INCITE, StableLM alpha"
ARCHITECTURE = "GPTNeoXForCausalLM"


def normed(megatron: str, huggingface: str, **options: Any) -> tuple[Rule, Rule]:
    """Return the rules of a norm's weight and of its bias."""
    weight = replicated(f"{megatron}weight", f"{huggingface}.weight", "hidden", **options)
    return weight, replicated(f"{megatron}bias", f"{huggingface}.bias", "hidden", **options)


def both(verb: Any, megatron: str, huggingface: str, *shape: str, **bias: Any) -> tuple[Rule, Rule]:
    """Return the rules of a layer's weight and of its bias; `bias` are options of the latter."""
    of_bias = replicated if verb is row_parallel else verb
    options = Options(**bias)
    return (
        verb(f"{megatron}.weight", f"{huggingface}.weight", *shape),
        of_bias(f"{megatron}.bias", f"{huggingface}.bias", *(shape[:-1]), **options),
    )


def _plain_attention(model: Model, _indices: Indices) -> bool:
    return not model.attention_bias


LAYER = (
    *normed("self_attention.linear_qkv.layer_norm_", "input_layernorm"),
    *both(column_parallel, "self_attention.linear_qkv", "attention.query_key_value", "fused", "hidden", absent=_plain_attention),
    *both(row_parallel, "self_attention.linear_proj", "attention.dense", "hidden", "queries", absent=_plain_attention),
    *normed("mlp.linear_fc1.layer_norm_", "post_attention_layernorm"),
    *both(column_parallel, "mlp.linear_fc1", "mlp.dense_h_to_4h", "ffn", "hidden"),
    *both(row_parallel, "mlp.linear_fc2", "mlp.dense_4h_to_h", "hidden", "ffn"),
)
RULES = (
    vocab_parallel("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight", "hidden"),
    *under("decoder.layers.{layer}", "gpt_neox.layers.{layer}", LAYER),
    *normed("decoder.final_layernorm.", "gpt_neox.final_layer_norm"),
    vocab_parallel("output_layer.weight", "embed_out.weight", "hidden", when=untied, tied_to="gpt_neox.embed_in.weight"),
)

_ROPE = rope("default", "linear", partial=partial_rotary(0.25, "rotary_pct"))


def _read_rope(config: Config) -> dict[str, Any]:
    base = {"rope_theta": config["rotary_emb_base"]} if "rotary_emb_base" in config else {}
    return _ROPE.to_megatron({**config, **base})


def _write_rope(config: Config) -> dict[str, Any]:
    fields = _ROPE.to_huggingface(config)
    return {**fields, "rotary_emb_base": fields["rope_theta"]}


def _nothing(_config: Config) -> dict[str, Any]:
    return {}


CONFIG = (
    *sizes(groups="", head_dim=""),
    named(fused=lambda model: model.queries + 2 * model.keys),
    *layer_norm(),
    *dropouts(hidden="hidden_dropout", embedding="hidden_dropout"),
    *mlp("gelu", "gelu_new", "relu", gated=False),
    Field(_read_rope, _write_rope),
    Field(
        lambda config: {"parallel_residual": "two_norms" if config.get("use_parallel_residual", True) else None},
        lambda config: {"use_parallel_residual": config.get("parallel_residual") is not None},
    ),
    Field(_nothing, _nothing, lambda sizes: {"attention_bias": bool(sizes.config.get("attention_bias", True))}),
    fixed(add_bias_linear=True, add_qkv_bias=False, qk_layernorm=False),
    no_window("window_size"),
)
EXTRAS = (*(f"gpt_neox.layers.{{layer}}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")),)
PROVIDER = ("parallel_residual",)
