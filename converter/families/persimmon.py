"""Persimmon: query, key and value fused head by head as Megatron has them, norms of both with biases, squared ReLU."""

from converter.config import fixed, flag, named
from converter.config_layers import no_window
from converter.config_parts import dropouts, layer_norm, mlp, sizes
from converter.config_rope import partial_rotary, rope
from converter.families import llama
from converter.model import Model
from converter.rules import Indices, column_parallel, replicated, row_parallel, under, with_bias

MODELS = "Persimmon"
ARCHITECTURE = "PersimmonForCausalLM"


def _normed(model: Model, _indices: Indices) -> bool:
    return model.qk_layernorm


def _head_norm(name: str):
    weight = replicated(f"self_attention.{name}.weight", f"self_attn.{name}.weight", "head_dim", when=_normed)
    return with_bias(weight)


LAYER = (
    *with_bias(llama.ATTENTION[0]),
    *with_bias(column_parallel("self_attention.linear_qkv.weight", "self_attn.query_key_value.weight", "fused", "hidden")),
    *_head_norm("q_layernorm"),
    *_head_norm("k_layernorm"),
    *with_bias(row_parallel("self_attention.linear_proj.weight", "self_attn.dense.weight", "hidden", "queries")),
    *with_bias(llama.MLP[0]),
    *with_bias(column_parallel("mlp.linear_fc1.weight", "mlp.dense_h_to_4h.weight", "ffn", "hidden")),
    *with_bias(row_parallel("mlp.linear_fc2.weight", "mlp.dense_4h_to_h.weight", "hidden", "ffn")),
)
EMBEDDING, _, HEAD = llama.decoder()
RULES = (
    EMBEDDING,
    *under("decoder.layers.{layer}", "model.layers.{layer}", LAYER),
    *with_bias(replicated("decoder.final_layernorm.weight", "model.final_layernorm.weight", "hidden")),
    HEAD,
)
CONFIG = (
    *sizes(groups="", head_dim="", positions_default=16384),
    *dropouts(elsewhere=("hidden_dropout",)),
    *layer_norm(),
    *mlp("relu2", "relu", "gelu", gated=False),
    fixed(add_bias_linear=True, add_qkv_bias=False),
    flag("qk_layernorm", "qk_layernorm", default=True),
    rope("default", "linear", partial=partial_rotary(0.5)),
    no_window("window_size"),
    named(fused=lambda model: 3 * model.queries),
)
EXTRAS = llama.EXTRAS
