"""GPT-J: both branches read one norm; `rotary_dim` numbers of each head are turned in pairs; attention has no biases."""

from typing import Any

from converter.config import Config, Field, count, fixed, number
from converter.config_layers import no_window
from converter.config_parts import dropouts, layer_norm, mlp, sizes
from converter.families.gpt_neox import both, normed
from converter.families.llama import untied
from converter.families.phi import BIASES
from converter.rules import Rule, always, column_parallel, qkv, replicated, row_parallel, under, vocab_parallel

MODELS = "GPT-J 6B"
ARCHITECTURE = "GPTJForCausalLM"


def decoder(attention: Rule) -> tuple[Rule, ...]:
    """Return the rules of a model with this rule of query, key and value."""
    layer = (
        *normed("input_layernorm.", "ln_1"),
        attention,
        qkv("self_attention.linear_qkv.bias", "", absent=always),
        row_parallel("self_attention.linear_proj.weight", "attn.out_proj.weight", "hidden", "queries"),
        replicated("self_attention.linear_proj.bias", "", "hidden", absent=always),
        *both(column_parallel, "mlp.linear_fc1", "mlp.fc_in", "ffn", "hidden"),
        *both(row_parallel, "mlp.linear_fc2", "mlp.fc_out", "hidden", "ffn"),
    )
    return (
        vocab_parallel("embedding.word_embeddings.weight", "transformer.wte.weight", "hidden"),
        *under("decoder.layers.{layer}", "transformer.h.{layer}", layer),
        *normed("decoder.final_layernorm.", "transformer.ln_f"),
        vocab_parallel("output_layer.weight", "lm_head.weight", "hidden", when=untied, tied_to="transformer.wte.weight"),
        vocab_parallel("output_layer.bias", "lm_head.bias"),
    )


RULES = decoder(qkv("self_attention.linear_qkv.weight", "attn.{q,k,v}_proj.weight", "hidden"))


def _four_times(config: Config) -> int:
    return 4 * count(config, "n_embd")


def _read_rotary(config: Config) -> dict[str, Any]:
    head = count(config, "n_embd") // count(config, "n_head")
    return {"rotary_percent": count({"rotary_dim": 64, **config}, "rotary_dim") / head}


def _write_rotary(config: Config) -> dict[str, Any]:
    return {"rotary_dim": round(number("rotary_percent", config.get("rotary_percent", 1.0)) * count(config, "kv_channels"))}


CONFIG = (
    *sizes(layers="n_layer", hidden="n_embd", heads="n_head", groups="", head_dim="", ffn="n_inner", ffn_default=_four_times,
           positions="n_positions"),
    *layer_norm("layer_norm_epsilon"),
    *dropouts(attention="attn_pdrop", hidden="resid_pdrop", embedding="embd_pdrop"),
    *mlp("gelu_new", "gelu", gated=False, huggingface="activation_function"),
    BIASES,
    Field(_read_rotary, _write_rotary),
    fixed(position_embedding_type="rope", rotary_base=10000.0, rotary_interleaved=True),
    no_window("window_size"),
)  # fmt: skip
EXTRAS = tuple(f"transformer.h.{{layer}}.attn.{name}" for name in ("bias", "masked_bias"))
SMALL = {"rotary_dim": 4}
PROVIDER = ("parallel_residual", "output_layer_bias")
