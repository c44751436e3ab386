"""StarCoder2: LayerNorm, biases everywhere, a feed-forward layer without a gate, and a window over the attention."""

from converter.config import field, fixed, flag, value
from converter.config_layers import window
from converter.config_parts import dropouts, layer_norm, mlp, sizes
from converter.config_rope import rope
from converter.families import llama
from converter.model import Model
from converter.rules import Indices, Rule, column_parallel, row_parallel, with_bias

MODELS = "StarCoder2"
ARCHITECTURE = "Starcoder2ForCausalLM"


def decoder(*layer: Rule) -> tuple[Rule, ...]:
    """Return the rules of a model whose layers have these, and whose last norm has a bias."""
    *others, norm, head = llama.decoder(*layer)
    return (*others, *with_bias(norm), head)


def _biased(model: Model, _indices: Indices) -> bool:
    return model.use_bias


RULES = decoder(
    *with_bias(llama.ATTENTION[0]),
    *with_bias(llama.ATTENTION[1], when=_biased),
    *with_bias(llama.ATTENTION[2], when=_biased),
    *with_bias(llama.MLP[0]),
    *with_bias(column_parallel("mlp.linear_fc1.weight", "mlp.c_fc.weight", "ffn", "hidden"), when=_biased),
    *with_bias(row_parallel("mlp.linear_fc2.weight", "mlp.c_proj.weight", "hidden", "ffn"), when=_biased),
)
CONFIG = (
    *sizes(positions_default=4096, tied=True),
    field("num_query_groups", "num_key_value_heads", default=value(2)),
    field("init_method_std", "initializer_range", default=value(0.018042)),
    *dropouts(hidden="residual_dropout", embedding="embedding_dropout"),
    *layer_norm("norm_epsilon"),
    *mlp("gelu_pytorch_tanh", "gelu", "relu", gated=False),
    flag("add_bias_linear", "use_bias", default=True),
    fixed(add_qkv_bias=False, qk_layernorm=False),
    rope("default", "linear", "yarn"),
    window("window_size", "sliding_window", default=None),
)
EXTRAS = llama.EXTRAS
SMALL = {"sliding_window": 8, "num_key_value_heads": 2}
