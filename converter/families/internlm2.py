"""InternLM2 (remote code): Llama under other names. Rows of `wqkv` go group by group, as in Megatron.

Names and rows are those of `modeling_internlm2.py` in the published repositories.
"""

from converter.config import flag, named
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama
from converter.model import Model
from converter.rules import (
    Indices,
    always,
    column_parallel,
    gated_mlp,
    replicated,
    row_parallel,
    under,
    vocab_parallel,
    with_bias,
)

MODELS = "InternLM2, InternLM2.5 (remote code)"
ARCHITECTURE = "InternLM2ForCausalLM"


def _biased(model: Model, _indices: Indices) -> bool:
    return model.bias


EMBEDDING = vocab_parallel("embedding.word_embeddings.weight", "model.tok_embeddings.weight", "hidden")
FC1 = gated_mlp("mlp.linear_fc1.weight", "feed_forward.{w1,w3}.weight", "ffn", "hidden")
FC2 = row_parallel("mlp.linear_fc2.weight", "feed_forward.w2.weight", "hidden", "ffn")
LAYER = (
    replicated("self_attention.linear_qkv.layer_norm_weight", "attention_norm.weight", "hidden", alias="input_layernorm.weight"),
    *with_bias(column_parallel("self_attention.linear_qkv.weight", "attention.wqkv.weight", "fused", "hidden"), when=_biased),
    *with_bias(row_parallel("self_attention.linear_proj.weight", "attention.wo.weight", "hidden", "queries"), when=_biased),
    replicated("mlp.linear_fc1.layer_norm_weight", "ffn_norm.weight", "hidden", alias="pre_mlp_layernorm.weight"),
    *with_bias(FC1, when=_biased, absent=always),
    *with_bias(FC2, when=_biased, absent=always),
)
RULES = (
    EMBEDDING,
    *under("decoder.layers.{layer}", "model.layers.{layer}", LAYER),
    replicated("decoder.final_layernorm.weight", "model.norm.weight", "hidden"),
    vocab_parallel("output_layer.weight", "output.weight", "hidden", when=llama.untied, tied_to=EMBEDDING.huggingface),
)
CONFIG = (
    *sizes(head_dim=""),
    *dropouts(attention=""),
    *rms_norm(),
    *mlp("silu", gated=True),
    llama.PLAIN_ATTENTION,
    flag("add_bias_linear", "bias", default=True),
    rope("default", "dynamic", "linear"),
    no_window("window_size"),
    named(fused=lambda model: model.queries + 2 * model.keys),
)
EXTRAS = ("model.layers.{layer}.attention.rotary_emb.inv_freq",)
PROVIDER = ("rope_parameters", "exact_sequence_length")
SMALL = {"bias": False}
