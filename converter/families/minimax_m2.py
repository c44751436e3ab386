"""MiniMax-M2: norms over all heads of queries and of keys, a part of each head turned, experts chosen by sigmoids and a bias."""

from dataclasses import replace
from typing import Any

from converter.config import Config, Field, count, field, fixed, number, value
from converter.config_experts import auxiliary_loss
from converter.config_layers import no_window
from converter.config_parts import dropouts, not_computed, rms_norm, routed, sizes
from converter.config_rope import partial_rotary, rope
from converter.config_router import sigmoid_scores
from converter.families import deepseek_v3, llama, mixtral, olmo2

MODELS = "MiniMax-M2, M2.1"
ARCHITECTURE = "MiniMaxM2ForCausalLM"

BIAS = replace(deepseek_v3.BIAS, huggingface="block_sparse_moe.e_score_correction_bias")
RULES = llama.decoder(*llama.ATTENTION, *olmo2.NORMS[:2], *mixtral.SPARSE, BIAS)
_PART = partial_rotary(1.0)


def _head_dim(config: Config) -> int:
    return count({"head_dim": config.get("head_dim", 128)}, "head_dim")


def _read_part(config: Config) -> dict[str, Any]:
    """Read the share of each head that is turned; published files have its channels, `rotary_dim`."""
    channels = config.get("rotary_dim")
    share = {} if channels is None else {"partial_rotary_factor": count(config, "rotary_dim") / _head_dim(config)}
    return _PART.to_megatron({**share, **config})


def _write_part(config: Config) -> dict[str, Any]:
    share = number("rotary_percent", config.get("rotary_percent", 1.0))
    return {} if share == 1 else {"rotary_dim": round(share * count(config, "kv_channels"))}


CONFIG = (
    *sizes(positions_default=196608),
    field("num_query_groups", "num_key_value_heads", default=value(8)),
    field("kv_channels", "head_dim", default=value(128)),
    *rms_norm(),
    *dropouts(),
    *mixtral.GATED,
    *llama.NO_BIAS,
    fixed(add_qkv_bias=False, qk_layernorm=True, qk_layernorm_scope="all_heads"),
    rope("default", "yarn", theta=5e6, partial=Field(_read_part, _write_part)),
    no_window("window_size"),
    *routed(experts="num_local_experts", topk="num_experts_per_tok", ffn="intermediate_size"),
    *sigmoid_scores(),
    auxiliary_loss(),
    not_computed("router_jitter_noise", off=0.0),
)
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 3, "rotary_dim": 8}
PROVIDER = ("qk_layernorm_scope", "rope_parameters")
