"""Nemotron: LayerNorm whose weight w multiplies by 1 + w, squared ReLU without a gate, and half of each head turned."""

from converter.config import field, flag, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, layer_norm, mlp, sizes
from converter.config_rope import partial_rotary, rope
from converter.families import llama, starcoder2
from converter.rules import column_parallel, with_bias

MODELS = "Nemotron 3 and 4, Minitron"
ARCHITECTURE = "NemotronForCausalLM"

UP = column_parallel("mlp.linear_fc1.weight", "mlp.up_proj.weight", "ffn", "hidden")
RULES = starcoder2.decoder(
    *with_bias(llama.ATTENTION[0]),
    *with_bias(llama.ATTENTION[1], when=llama.biased, absent=llama.plain_attention),
    *with_bias(llama.ATTENTION[2], when=llama.biased, absent=llama.plain_attention),
    *with_bias(llama.MLP[0]),
    *with_bias(UP, when=llama.biased, absent=llama.plain_mlp),
    *with_bias(llama.MLP[2], when=llama.biased, absent=llama.plain_mlp),
)
CONFIG = (
    *sizes(positions_default=4096),
    field("init_method_std", "initializer_range", default=value(0.0134)),
    *dropouts(),
    *layer_norm("norm_eps", zero_centered=True),
    *mlp("relu2", gated=False),
    llama.PLAIN_ATTENTION,
    flag("add_bias_linear", "attention_bias", "mlp_bias"),
    rope("default", "linear", partial=partial_rotary(0.5)),
    no_window("window_size"),
)
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 16}
