"""Mellum 2: Qwen3 with experts, some layers slide, and those have rotary embeddings of their own."""

from typing import Any

from converter.config import Config, Field, fixed, object_of, value
from converter.config_experts import SOFTMAX, auxiliary_loss
from converter.config_layers import all_full, window_pattern
from converter.config_nested import renamed
from converter.config_parts import dropouts, field, only, rms_norm, routed, sizes
from converter.config_rope import rope_by_type
from converter.config_router import kinds_of_layers
from converter.families import llama, mixtral, qwen3_moe
from formats.errors import UserError

MODELS = "Mellum 2"
ARCHITECTURE = "MellumForCausalLM"

RULES = qwen3_moe.RULES


def _by_type(config: Config) -> dict[str, Any]:
    """Refuse rotary embeddings of all layers together, which transformers ignores or fails with."""
    numbers = ("rope_parameters", "rope_scaling", "rope_theta")
    together = [name for name in numbers if config.get(name) is not None]
    if together and not any(isinstance(value, dict) for value in object_of(config, numbers[0]).values()):
        raise UserError(
            f"`{together[0]}` is not said for each type of layers",
            hint="this family has `full_attention` and `sliding_attention` in `rope_parameters`",
        )
    return {}


CONFIG = (
    *sizes(head_dim_default=128, positions_default=131072),
    *dropouts(),
    *rms_norm(),
    *mixtral.GATED,
    *llama.NO_BIAS,
    field("num_query_groups", "num_key_value_heads", default=value(4)),
    window_pattern(all_full, default=1024),
    Field(_by_type, lambda _config: {}),
    rope_by_type("default", "yarn", theta=500000.0, sliding_theta=10000.0),
    renamed(
        routed(experts="num_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size", renormalized="norm_topk_prob"),
        num_local_experts="num_experts",  # as transformers 5 writes it
    ),
    SOFTMAX,
    kinds_of_layers(0),
    auxiliary_loss(),
    only(attention_bias=False),
    fixed(add_qkv_bias=False, qk_layernorm=True),
)
EXTRAS = llama.EXTRAS
PASSTHROUGH_PREFIXES = ("mtp.",)
SMALL = {
    "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "rope_parameters": {
        "full_attention": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
            "attention_factor": 1.2, "beta_fast": 32, "beta_slow": 1,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}  # fmt: skip
PROVIDER = ("sliding_rope",)
