"""Layers of two kinds; a tensor whose sections go group by group; a number that is added to every value; shared experts."""

from converter.config import activation, fixed, named
from converter.config_parts import by_layer, dimension, routed, shared_experts
from converter.config_rope import rope
from converter.families import llama
from converter.rows import RowRange
from converter.rules import Rule, column_parallel, gated_mlp, replicated, row_parallel, sections, under

MODELS, ARCHITECTURE = "Qwen3-Next", "Qwen3NextForCausalLM"


def gated(parts, model):
    """Group by group queries, gates, key, value; `q_proj` holds query and gate head by head."""
    size, heads, dst_row = model.head_dim, model.heads // model.groups, 0
    for group in range(model.groups):
        for half in (0, 1):
            for head in range(heads):
                yield RowRange(0, (2 * (group * heads + head) + half) * size, dst_row, size)
                dst_row += size
        for part in (1, 2):
            yield RowRange(part, group * size, dst_row, size)
            dst_row += size


def linear(model, indices):
    return indices["layer"] in model.linear_layers


def full(model, indices):
    return indices["layer"] not in model.linear_layers


A, L = "self_attention.", "linear_attn."
FULL = (
    llama.ATTENTION[0],
    Rule(f"{A}linear_qkv.weight", "self_attn.{q,k,v}_proj.weight",
         (("gated_queries", "hidden"), ("keys", "hidden"), ("keys", "hidden")), gated, partition_dim=0),
    llama.ATTENTION[2],
    replicated(f"{A}q_layernorm.weight", "self_attn.q_norm.weight", "head_dim"),
    replicated(f"{A}k_layernorm.weight", "self_attn.k_norm.weight", "head_dim"),
)  # fmt: skip
LINEAR = (
    replicated(f"{A}in_proj.layer_norm_weight", "input_layernorm.weight", "hidden"),
    *sections(f"{A}in_proj.weight.{{query,key,value,z}}", f"{L}in_proj_qkvz.weight",
              ("l_keys", "l_keys", "l_values", "l_values"), "hidden", groups="linear_groups"),
    *sections(f"{A}in_proj.weight.{{beta,alpha}}", f"{L}in_proj_ba.weight",
              ("linear_heads", "linear_heads"), "hidden", groups="linear_groups"),
    *sections(f"{A}conv1d.weight.{{query,key,value}}", f"{L}conv1d.weight", ("l_keys", "l_keys", "l_values"), 1, "kernel"),
    column_parallel(f"{A}A_log", f"{L}A_log", "linear_heads"),
    column_parallel(f"{A}dt_bias", f"{L}dt_bias", "linear_heads"),
    replicated(f"{A}out_norm.weight", f"{L}norm.weight", "l_dim", offset=-1.0),
    row_parallel(f"{A}out_proj.weight", f"{L}out_proj.weight", "hidden", "l_values"),
)  # fmt: skip
MOE = (
    replicated("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
    replicated("mlp.router.weight", "mlp.gate.weight", "experts", "hidden"),
    gated_mlp("mlp.experts.{expert}.linear_fc1.weight", "mlp.experts.{expert}.{gate,up}_proj.weight", "moe_ffn", "hidden"),
    row_parallel("mlp.experts.{expert}.linear_fc2.weight", "mlp.experts.{expert}.down_proj.weight", "hidden", "moe_ffn"),
    gated_mlp("mlp.shared_experts.linear_fc1.weight", "mlp.shared_expert.{gate,up}_proj.weight", "shared_ffn", "hidden"),
    row_parallel("mlp.shared_experts.linear_fc2.weight", "mlp.shared_expert.down_proj.weight", "hidden", "shared_ffn"),
    replicated("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", 1, "hidden"),
)
BODY = llama.decoder()
RULES = (
    BODY[0],
    *under("decoder.layers.{layer}", "model.layers.{layer}", FULL, when=full),
    *under("decoder.layers.{layer}", "model.layers.{layer}", LINEAR, when=linear),
    *under("decoder.layers.{layer}", "model.layers.{layer}", MOE),
    *BODY[1:],
)
CONFIG = (
    *llama.SIZES,
    activation("silu"),
    rope("default"),
    fixed(add_bias_linear=False),
    *routed(experts="num_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size", renormalized="norm_topk_prob"),
    *shared_experts("shared_expert_intermediate_size"),
    by_layer("linear_attention_freq", "layer_types", {"full_attention": 0, "linear_attention": 1}, size="linear_layers"),
    *dimension("l_key_dim", "linear_key_head_dim"),
    *dimension("l_dim", "linear_value_head_dim"),
    *dimension("linear_groups", "linear_num_key_heads"),
    *dimension("linear_heads", "linear_num_value_heads"),
    *dimension("kernel", "linear_conv_kernel_dim"),
    named(
        stacked=False,
        gated_queries=lambda model: 2 * model.heads * model.head_dim,
        l_keys=lambda model: model.linear_groups * model.l_key_dim,
        l_values=lambda model: model.linear_heads * model.l_dim,
    ),
)
PASSTHROUGH_PREFIXES = ("mtp.", "visual.")
WEIGHTS_ONLY = "a gated delta net"
