"""Seed-OSS: Llama with a switch each for the biases of query, key and value, of attention's output, and of the rest."""

from converter.config import field, fixed, flag, switches, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama
from converter.model import Model
from converter.rules import Condition, Indices, gated_mlp, qkv, replicated

MODELS = "Seed-OSS 36B"
ARCHITECTURE = "SeedOssForCausalLM"


def _biased(model: Model, _indices: Indices) -> bool:
    """megatron-core has one switch for all biases, and one for those of query, key and value alone."""
    return model.attention_out_bias or model.mlp_bias


def _biased_queries(model: Model, indices: Indices) -> bool:
    return model.attention_bias or _biased(model, indices)


def _without(switch: str) -> Condition:
    return lambda model, _indices: not getattr(model, switch)


RULES = llama.decoder(
    *llama.ATTENTION,
    qkv("self_attention.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias", when=_biased_queries, absent=_without("attention_bias")),
    replicated("self_attention.linear_proj.bias", "self_attn.o_proj.bias", "hidden", when=_biased,
               absent=_without("attention_out_bias")),
    *llama.MLP,
    gated_mlp("mlp.linear_fc1.bias", "mlp.{gate,up}_proj.bias", "ffn", when=_biased, absent=_without("mlp_bias")),
    replicated("mlp.linear_fc2.bias", "mlp.down_proj.bias", "hidden", when=_biased, absent=_without("mlp_bias")),
)  # fmt: skip
CONFIG = (
    *sizes(groups_default=8, head_dim_default=128, positions_default=524288),
    *dropouts(hidden="residual_dropout", default=0.1),
    *rms_norm(),
    *mlp("silu", gated=True),
    fixed(qk_layernorm=False),
    field("add_qkv_bias", "attention_bias", default=value(True)),
    switches(attention_bias="add_qkv_bias"),
    flag("add_bias_linear", "attention_out_bias", "mlp_bias"),
    rope("default", "linear", "llama3", "yarn"),
    no_window("window_size"),
)
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 16, "residual_dropout": 0.0}
