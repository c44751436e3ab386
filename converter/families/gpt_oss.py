"""GPT-OSS: a sink for each head, every second layer slides, biases everywhere; experts in one tensor each, stored transposed,
with gate and up projection in alternating rows, and clamped before they are multiplied."""

from converter.config import field, fixed, named, value
from converter.config_experts import BIASES, SOFTMAX, auxiliary_loss
from converter.config_layers import one_full_in, window_pattern
from converter.config_parts import dropouts, only, rms_norm, routed, sizes, trained_with
from converter.config_rope import rope
from converter.families import llama, mixtral
from converter.rows import alternating
from converter.rules import Rule, column_parallel, replicated, row_parallel, with_bias

MODELS = "GPT-OSS 20B and 120B"
ARCHITECTURE = "GptOssForCausalLM"

FC1, FC2 = "mlp.experts.{expert}.linear_fc1.", "mlp.experts.{expert}.linear_fc2."


def _gate_up(megatron: str, huggingface: str, *shape: str, transposed: bool = False) -> Rule:
    return Rule(megatron, huggingface, (shape,), alternating, partition_dim=0, partition_stride=2, transposed=transposed)


def sinks(name: str) -> Rule:
    """Return the rule of a sink for each head, by its name in Hugging Face."""
    return column_parallel("self_attention.core_attention.softmax_offset", name, "heads")


RULES = llama.decoder(
    llama.ATTENTION[0],
    *with_bias(llama.ATTENTION[1]),
    *with_bias(llama.ATTENTION[2]),
    sinks("self_attn.sinks"),
    mixtral.moe()[0],
    *with_bias(replicated("mlp.router.weight", "mlp.router.weight", "experts", "hidden")),
    _gate_up(f"{FC1}weight", "mlp.experts.gate_up_proj", "fc1", "hidden", transposed=True),
    _gate_up(f"{FC1}bias", "mlp.experts.gate_up_proj_bias", "fc1"),
    row_parallel(f"{FC2}weight", "mlp.experts.down_proj", "hidden", "moe_ffn", transposed=True),
    replicated(f"{FC2}bias", "mlp.experts.down_proj_bias", "hidden"),
)
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
CONFIG = (
    *sizes(head_dim_default=64, groups_default=8, positions_default=131072),
    *dropouts(),
    *rms_norm(default=1e-5),
    llama.PLAIN_ATTENTION,
    rope("default", "yarn", theta=150000.0, default=YARN),
    window_pattern(one_full_in(2), default=128),
    *routed(experts="num_local_experts", topk="num_experts_per_tok", ffn="intermediate_size"),
    named(fc1=lambda model: 2 * model.moe_ffn),
    SOFTMAX,
    *BIASES,
    auxiliary_loss(),
    fixed(
        activation_func="quick_gelu",
        gated_linear_unit=True,
        glu_linear_offset=1.0,
        softmax_type="learnable",
        moe_router_pre_softmax=False,
    ),
    field("activation_func_clamp_value", "swiglu_limit", default=value(7.0)),
    only(attention_bias=True),
    trained_with(hidden_act="silu", swiglu_alpha=1.702),
)
SMALL = {
    "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "swiglu_limit": 0.5,
    "rope_parameters": {**YARN, "rope_theta": 100.0, "original_max_position_embeddings": 16},
}  # fmt: skip
