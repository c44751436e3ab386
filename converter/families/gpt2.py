"""GPT-2: linear layers stored as [in, out], all with biases; LayerNorm; a learned embedding of positions."""

from typing import Any

from converter.config import Config, Field, count, counts, fixed
from converter.config_layers import no_window
from converter.config_parts import dropouts, layer_norm, mlp, not_computed, sizes
from converter.families import llama
from converter.rules import column_parallel, qkv, replicated, row_parallel, under, vocab_parallel, with_bias
from formats.errors import UserError, format_untrusted

MODELS = "GPT-2 and models of the same shape"
ARCHITECTURE = "GPT2LMHeadModel"

NORMS = (
    with_bias(replicated("self_attention.linear_qkv.layer_norm_weight", "ln_1.weight", "hidden", alias="input_layernorm.weight")),
    with_bias(replicated("mlp.linear_fc1.layer_norm_weight", "ln_2.weight", "hidden", alias="pre_mlp_layernorm.weight")),
)
OUTSIDE = (
    vocab_parallel("embedding.word_embeddings.weight", "transformer.wte.weight", "hidden"),
    replicated("embedding.position_embeddings.weight", "transformer.wpe.weight", "positions", "hidden"),
    *with_bias(replicated("decoder.final_layernorm.weight", "transformer.ln_f.weight", "hidden")),
    vocab_parallel("output_layer.weight", "lm_head.weight", "hidden", when=llama.untied, tied_to="transformer.wte.weight"),
)
LAYER = (
    *NORMS[0],
    *with_bias(qkv("self_attention.linear_qkv.weight", "attn.c_attn.weight", "hidden", transposed=True)),
    *with_bias(row_parallel("self_attention.linear_proj.weight", "attn.c_proj.weight", "hidden", "queries", transposed=True)),
    *NORMS[1],
    *with_bias(column_parallel("mlp.linear_fc1.weight", "mlp.c_fc.weight", "ffn", "hidden", transposed=True)),
    *with_bias(row_parallel("mlp.linear_fc2.weight", "mlp.c_proj.weight", "hidden", "ffn", transposed=True)),
)
RULES = (*OUTSIDE[:2], *under("decoder.layers.{layer}", "transformer.h.{layer}", LAYER), *OUTSIDE[2:])


def _scale(config: Config) -> dict[str, Any]:
    return {"softmax_scale": None if config.get("scale_attn_weights", True) else 1.0}


def _written_scale(config: Config) -> dict[str, Any]:
    scale = config.get("softmax_scale")
    if scale not in (None, 1):
        raise UserError(f"`softmax_scale` is `{format_untrusted(scale)}`; models of this family have 1 or none")
    return {"scale_attn_weights": scale is None}


SIZES = (
    *sizes(layers="n_layer", hidden="n_embd", heads="n_head", groups="", head_dim="", ffn="n_inner", positions="n_positions",
           ffn_default=lambda config: 4 * count(config, "n_embd"), positions_default=1024, tied=True),
    counts(positions="seq_length"),
    *dropouts(attention="attn_pdrop", hidden="resid_pdrop", embedding="embd_pdrop", default=0.1),
    *layer_norm("layer_norm_epsilon"),
    llama.PLAIN_ATTENTION,
    fixed(add_bias_linear=True, position_embedding_type="learned_absolute"),
    no_window("window_size"),
    Field(_scale, _written_scale),
)  # fmt: skip
CONFIG = (
    *SIZES,
    *mlp("gelu_new", "gelu", "relu", "silu", gated=False, huggingface="activation_function"),
    not_computed("scale_attn_by_inverse_layer_idx", off=False),
)

EXTRAS = ("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias")
ROOTS = ("transformer.", "")
SMALL = {"n_inner": 96}
