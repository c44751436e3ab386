"""Experts one after another along the rows of one tensor each; `w2` transposed; query, key and value in one tensor."""

from converter.config import Field
from converter.rules import always, gated_mlp, qkv, replicated, row_parallel, under, vocab_parallel

MODELS, ARCHITECTURE = "DBRX", "DbrxForCausalLM"


def norm(megatron, huggingface):
    yield replicated(f"{megatron}weight", f"{huggingface}.weight", "hidden")
    yield replicated(f"{megatron}bias", "", "hidden", absent=always)


E = "mlp.experts.{expert}"
LAYER = (
    *norm("self_attention.linear_qkv.layer_norm_", "norm_attn_norm.norm_1"),
    qkv("self_attention.linear_qkv.weight", "norm_attn_norm.attn.Wqkv.weight", "hidden"),
    row_parallel("self_attention.linear_proj.weight", "norm_attn_norm.attn.out_proj.weight", "hidden", "queries"),
    *norm("pre_mlp_layernorm.", "norm_attn_norm.norm_2"),
    replicated("mlp.router.weight", "ffn.router.layer.weight", "experts", "hidden"),
    gated_mlp(f"{E}.linear_fc1.weight", "ffn.experts.mlp.{w1,v1}", "moe_ffn", "hidden", flat=True),
    row_parallel(f"{E}.linear_fc2.weight", "ffn.experts.mlp.w2", "hidden", "moe_ffn", flat=True, transposed=True),
)
RULES = (
    vocab_parallel("embedding.word_embeddings.weight", "transformer.wte.weight", "hidden"),
    *under("decoder.layers.{layer}", "transformer.blocks.{layer}", LAYER),
    *norm("decoder.final_layernorm.", "transformer.norm_f"),
    vocab_parallel("output_layer.weight", "lm_head.weight", "hidden"),
)


def sizes(s):
    c, a, f = s.config, s.config["attn_config"], s.config["ffn_config"]
    return {
        "layers": c["n_layers"], "hidden": c["d_model"], "heads": c["n_heads"], "groups": a["kv_n_heads"], "tied": False,
        "head_dim": c["d_model"] // c["n_heads"], "vocab": c["vocab_size"], "experts": f["moe_num_experts"],
        "moe_ffn": f["ffn_hidden_size"],
    }  # fmt: skip


CONFIG = (
    Field(
        lambda c: {
            "num_layers": c["n_layers"],
            "hidden_size": c["d_model"],
            "vocab_size": c["vocab_size"],
            "activation_func": "silu",
            "normalization": "LayerNorm",
        },
        lambda _: {},
        sizes,
    ),
)
WEIGHTS_ONLY = "`clip_qkv`"
