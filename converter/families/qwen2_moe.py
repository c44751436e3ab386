"""Qwen2 with experts: an expert that every token goes through, scaled by a gate, beside the chosen ones."""

from collections.abc import Sequence

from converter.config import Config, field, fixed, number, switches, value
from converter.config_experts import SOFTMAX, auxiliary_loss, each_nth
from converter.config_layers import FULL, SLIDING, layers_of, window_pattern
from converter.config_parts import routed, shared_experts
from converter.config_rope import rope
from converter.families import glm4, llama, mixtral
from converter.rules import replicated

MODELS = "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B"
ARCHITECTURE = "Qwen2MoeForCausalLM"

SHARED = (
    *mixtral.shared("mlp.shared_expert.{gate,up}_proj.weight", "mlp.shared_expert.down_proj.weight"),
    replicated("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", 1, "hidden"),
)
RULES = llama.decoder(*glm4.ATTENTION, *mixtral.mixed(llama.MLP, (*mixtral.moe(), *SHARED)))


def _every_second(config: Config) -> list[str]:
    """Return the types of layers of which each second of the first `max_window_layers` slides, if any do."""
    slide = config.get("use_sliding_window")
    first = number("max_window_layers", config.get("max_window_layers", 28)) if slide else 0
    return [SLIDING if layer % 2 == 0 and layer < first else FULL for layer in range(layers_of(config))]


def _last_sliding(types: Sequence[str]) -> dict[str, int]:
    """Return the field of the layers that may slide, if any do."""
    sliding = [layer for layer, kind in enumerate(types) if kind == SLIDING]
    return {"max_window_layers": sliding[-1] + 1} if sliding else {}


CONFIG = (
    *llama.SIZES,
    *mixtral.GATED,
    *llama.NO_BIAS,
    fixed(qk_layernorm=False),
    field("add_qkv_bias", "qkv_bias", default=value(True)),
    switches(qkv_bias="add_qkv_bias"),
    field("num_query_groups", "num_key_value_heads", default=value(16)),
    field("seq_length", "max_position_embeddings", default=value(32768)),
    rope("default", "yarn"),
    window_pattern(_every_second, default=4096, unused=0, switch="use_sliding_window", pattern=_last_sliding),
    *routed(
        experts="num_experts",
        topk="num_experts_per_tok",
        ffn="moe_intermediate_size",
        renormalized="norm_topk_prob",
        absent=False,
    ),
    *shared_experts("shared_expert_intermediate_size"),
    fixed(moe_shared_expert_gate=True),
    SOFTMAX,
    each_nth(),
    auxiliary_loss(),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80,
    "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3,
}  # fmt: skip
