"""InternLM3: Llama, with a base of rotary embeddings that grows with sequences beyond the original length."""

from typing import Any

from converter.config import Config, Field, field, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama
from formats.errors import UserError, format_untrusted

MODELS = "InternLM3"
ARCHITECTURE = "InternLM3ForCausalLM"

RULES = llama.RULES

_BIASES = ("attention_bias", "mlp_bias", "qkv_bias", "bias")
"""One switch: transformers' names, and those of the published repositories."""


def _read_bias(config: Config) -> dict[str, Any]:
    biases = {name: bool(config[name]) for name in _BIASES if config.get(name) is not None}
    if len(set(biases.values())) > 1:
        raise UserError(
            f"`config.json` has {', '.join(f'`{name}`: `{format_untrusted(on)}`' for name, on in biases.items())}",
            hint="models of this family have all biases or none",
        )
    return {"add_bias_linear": any(biases.values())}


BIAS = Field(
    _read_bias,
    lambda config: dict.fromkeys(_BIASES, bool(config.get("add_bias_linear"))),
    lambda sizes: dict.fromkeys(("attention_bias", "mlp_bias"), sizes.megatron["add_bias_linear"]),
)
CONFIG = (
    *sizes(positions_default=32768),
    field("num_query_groups", "num_key_value_heads", default=value(2)),
    field("kv_channels", "head_dim", default=value(128)),
    *dropouts(),
    *rms_norm(default=1e-5),
    *mlp("silu", gated=True),
    llama.PLAIN_ATTENTION,
    BIAS,
    rope("default", "dynamic", "linear"),
    no_window("window_size"),
)
EXTRAS = llama.EXTRAS
PROVIDER = ("rope_parameters", "exact_sequence_length")
SMALL = {"head_dim": 16, "attention_bias": True, "mlp_bias": True}
