"""Experts in one tensor each, stored transposed, gate and up projection in alternating rows; biases; a sink for each head."""

from converter.config import Field, activation, fixed
from converter.config_parts import routed
from converter.config_rope import rope
from converter.families import llama
from converter.rows import alternating
from converter.rules import Rule, column_parallel, qkv, replicated, row_parallel

MODELS, ARCHITECTURE = "GPT-OSS in bf16", "GptOssForCausalLM"

FC1, FC2 = "mlp.experts.{expert}.linear_fc1.", "mlp.experts.{expert}.linear_fc2."
GATE_UP = {"row_order": alternating, "partition_dim": 0, "partition_stride": 2}
RULES = llama.decoder(
    *llama.ATTENTION,
    qkv("self_attention.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias"),
    replicated("self_attention.linear_proj.bias", "self_attn.o_proj.bias", "hidden"),
    column_parallel("self_attention.core_attention.softmax_offset", "self_attn.sinks", "heads"),
    replicated("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
    replicated("mlp.router.weight", "mlp.router.weight", "experts", "hidden"),
    replicated("mlp.router.bias", "mlp.router.bias", "experts"),
    Rule(f"{FC1}weight", "mlp.experts.gate_up_proj", (("fc1", "hidden"),), transposed=True, **GATE_UP),
    Rule(f"{FC1}bias", "mlp.experts.gate_up_proj_bias", (("fc1",),), **GATE_UP),
    row_parallel(f"{FC2}weight", "mlp.experts.down_proj", "hidden", "moe_ffn", transposed=True),
    replicated(f"{FC2}bias", "mlp.experts.down_proj_bias", "hidden"),
)
CONFIG = (
    *llama.SIZES,
    activation("silu"),
    rope("default", "yarn"),
    *routed(experts="num_local_experts", topk="num_experts_per_tok", ffn="intermediate_size"),
    Field(lambda _: {"softmax_type": "learnable"}, lambda _: {}, lambda s: {"fc1": 2 * s.known["moe_ffn"]}),
    fixed(add_bias_linear=True),
)
WEIGHTS_ONLY = "no YaRN and no sinks here"
