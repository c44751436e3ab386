"""What the published layouts say of families' weights, worked out with plain slices: Megatron's tensors from Hugging Face's.

Each family's function takes the tensors of a model directory, by their names, and returns those of Megatron, with a number for
each layer and expert. Sizes are those of the models in `MODELS`.
"""

from __future__ import annotations

import torch

SMALL = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 96, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "qwen2": SMALL,
    "phi3": {**SMALL, "pad_token_id": 0},
    "olmo": {**{key: value for key, value in SMALL.items() if key != "head_dim"}, "pad_token_id": 0},
    "mixtral": {**SMALL, **EXPERTS},
    "gpt_oss": {**SMALL, **EXPERTS},
    "dbrx": {
        "n_layers": 3, "d_model": 32, "n_heads": 4, "max_seq_len": 64, "vocab_size": 96,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1e6, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "mamba2": {
        "num_hidden_layers": 3, "hidden_size": 32, "vocab_size": 96, "head_dim": 8, "num_heads": 8, "expand": 2, "n_groups": 2,
        "state_size": 4, "pad_token_id": 0, "tie_word_embeddings": False,
    },
    "qwen3_next": {
        **SMALL, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40, "partial_rotary_factor": 1.0,
        "linear_key_head_dim": 4, "linear_value_head_dim": 6, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "layer_types": [*["linear_attention"] * 2, "full_attention", "linear_attention"],
    },
}  # fmt: skip


def fused_qkv(q, k, v, groups=2):
    """Group by group: its queries, its key, its value."""
    parts = [part.reshape(groups, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(parts, 1).reshape(-1, *q.shape[1:])


def attention(t, megatron, huggingface, out, *, bias=False):
    q, k, v = (t[f"{huggingface}self_attn.{name}_proj.weight"] for name in "qkv")
    out[f"{megatron}self_attention.linear_qkv.weight"] = fused_qkv(q, k, v)
    out[f"{megatron}self_attention.linear_qkv.layer_norm_weight"] = t[f"{huggingface}input_layernorm.weight"]
    out[f"{megatron}self_attention.linear_proj.weight"] = t[f"{huggingface}self_attn.o_proj.weight"]
    if bias:
        q, k, v = (t[f"{huggingface}self_attn.{name}_proj.bias"] for name in "qkv")
        out[f"{megatron}self_attention.linear_qkv.bias"] = fused_qkv(q, k, v)


def mlp(t, megatron, huggingface, out):
    out[f"{megatron}mlp.linear_fc1.layer_norm_weight"] = t[f"{huggingface}post_attention_layernorm.weight"]
    gate, up = (t[f"{huggingface}mlp.{name}_proj.weight"] for name in ("gate", "up"))
    out[f"{megatron}mlp.linear_fc1.weight"] = torch.cat([gate, up])
    out[f"{megatron}mlp.linear_fc2.weight"] = t[f"{huggingface}mlp.down_proj.weight"]


def outside(t, embedding="model.embed_tokens.weight", norm="model.norm.weight", megatron_norm="decoder.final_layernorm.weight"):
    def padded(weight):
        return torch.cat([weight, torch.zeros(-len(weight) % 128, weight.shape[1], dtype=weight.dtype)])

    out = {"embedding.word_embeddings.weight": padded(t[embedding])}
    if norm:
        out[megatron_norm] = t[norm]
    if "lm_head.weight" in t:
        out["output_layer.weight"] = padded(t["lm_head.weight"])
    return out


def layers(t, prefix="model.layers"):
    count = 1 + max(int(name.split(f"{prefix}.")[1].split(".")[0]) for name in t if f"{prefix}." in name)
    return [(f"decoder.layers.{n}.", f"{prefix}.{n}.") for n in range(count)]


def qwen2(t):
    out = outside(t)
    for m, h in layers(t):
        attention(t, m, h, out, bias=True)
        mlp(t, m, h, out)
    return out


def phi3(t):
    out = outside(t)
    for m, h in layers(t):
        q, k, v = t[f"{h}self_attn.qkv_proj.weight"].split([32, 16, 16])
        out[f"{m}self_attention.linear_qkv.weight"] = fused_qkv(q, k, v)
        out[f"{m}self_attention.linear_qkv.layer_norm_weight"] = t[f"{h}input_layernorm.weight"]
        out[f"{m}self_attention.linear_proj.weight"] = t[f"{h}self_attn.o_proj.weight"]
        out[f"{m}mlp.linear_fc1.layer_norm_weight"] = t[f"{h}post_attention_layernorm.weight"]
        out[f"{m}mlp.linear_fc1.weight"] = t[f"{h}mlp.gate_up_proj.weight"]
        out[f"{m}mlp.linear_fc2.weight"] = t[f"{h}mlp.down_proj.weight"]
    return out


def olmo(t):
    ones, zeros = torch.ones(32, dtype=torch.bfloat16), torch.zeros(32, dtype=torch.bfloat16)
    out = {**outside(t, norm=""), "decoder.final_layernorm.weight": ones, "decoder.final_layernorm.bias": zeros}
    for m, h in layers(t):
        known = {**t, f"{h}input_layernorm.weight": ones, f"{h}post_attention_layernorm.weight": ones}
        attention(known, m, h, out)
        mlp(known, m, h, out)
        for module in ("self_attention.linear_qkv", "mlp.linear_fc1"):
            out[f"{m}{module}.layer_norm_bias"] = zeros
    return out


def mixtral(t):
    out = outside(t)
    for m, h in layers(t):
        attention(t, m, h, out)
        out[f"{m}pre_mlp_layernorm.weight"] = t[f"{h}post_attention_layernorm.weight"]
        out[f"{m}mlp.router.weight"] = t[f"{h}block_sparse_moe.gate.weight"]
        for e in range(4):
            w1, w2, w3 = (t[f"{h}block_sparse_moe.experts.{e}.w{n}.weight"] for n in (1, 2, 3))
            out[f"{m}mlp.experts.{e}.linear_fc1.weight"] = torch.cat([w1, w3])
            out[f"{m}mlp.experts.{e}.linear_fc2.weight"] = w2
    return out


def gpt_oss(t):
    out = outside(t)
    for m, h in layers(t):
        attention(t, m, h, out, bias=True)
        out[f"{m}self_attention.linear_proj.bias"] = t[f"{h}self_attn.o_proj.bias"]
        out[f"{m}self_attention.core_attention.softmax_offset"] = t[f"{h}self_attn.sinks"]
        out[f"{m}pre_mlp_layernorm.weight"] = t[f"{h}post_attention_layernorm.weight"]
        for name in ("weight", "bias"):
            out[f"{m}mlp.router.{name}"] = t[f"{h}mlp.router.{name}"]
        for e in range(4):
            fc1 = t[f"{h}mlp.experts.gate_up_proj"][e].T
            bias = t[f"{h}mlp.experts.gate_up_proj_bias"][e]
            out[f"{m}mlp.experts.{e}.linear_fc1.weight"] = torch.cat([fc1[::2], fc1[1::2]])
            out[f"{m}mlp.experts.{e}.linear_fc1.bias"] = torch.cat([bias[::2], bias[1::2]])
            out[f"{m}mlp.experts.{e}.linear_fc2.weight"] = t[f"{h}mlp.experts.down_proj"][e].T
            out[f"{m}mlp.experts.{e}.linear_fc2.bias"] = t[f"{h}mlp.experts.down_proj_bias"][e]
    return out


def dbrx(t):
    zeros = torch.zeros(32, dtype=torch.bfloat16)
    out = {**outside(t, "transformer.wte.weight", "transformer.norm_f.weight"), "decoder.final_layernorm.bias": zeros}
    for m, h in layers(t, "transformer.blocks"):
        q, k, v = t[f"{h}norm_attn_norm.attn.Wqkv.weight"].split([32, 16, 16])
        out[f"{m}self_attention.linear_qkv.weight"] = fused_qkv(q, k, v)
        out[f"{m}self_attention.linear_qkv.layer_norm_weight"] = t[f"{h}norm_attn_norm.norm_1.weight"]
        out[f"{m}self_attention.linear_qkv.layer_norm_bias"] = out[f"{m}pre_mlp_layernorm.bias"] = zeros
        out[f"{m}self_attention.linear_proj.weight"] = t[f"{h}norm_attn_norm.attn.out_proj.weight"]
        out[f"{m}pre_mlp_layernorm.weight"] = t[f"{h}norm_attn_norm.norm_2.weight"]
        out[f"{m}mlp.router.weight"] = t[f"{h}ffn.router.layer.weight"]
        w1, v1, w2 = (t[f"{h}ffn.experts.mlp.{name}"].reshape(4, 48, 32) for name in ("w1", "v1", "w2"))
        for e in range(4):
            out[f"{m}mlp.experts.{e}.linear_fc1.weight"] = torch.cat([w1[e], v1[e]])
            out[f"{m}mlp.experts.{e}.linear_fc2.weight"] = w2[e].T
    return out


def mamba2(t):
    out = outside(t, "backbone.embeddings.weight", "backbone.norm_f.weight", "decoder.final_norm.weight")
    for layer, h in layers(t, "backbone.layers"):
        m, g = f"{layer}mixer.", f"{h}mixer."
        out[f"{m}in_proj.layer_norm_weight"] = t[f"{h}norm.weight"]
        for name in ("A_log", "D"):
            out[f"{m}{name}"] = t[f"{g}{name}"].float()
        out[f"{m}dt_bias"] = t[f"{g}dt_bias"]
        sizes = {"z": 64, "x": 64, "B": 8, "C": 8, "dt": 8}
        for name, part in zip(sizes, t[f"{g}in_proj.weight"].split([*sizes.values()]), strict=True):
            out[f"{m}in_proj.weight.{name}"] = part
        for kind in ("weight", "bias"):
            for name, part in zip("xBC", t[f"{g}conv1d.{kind}"].split([64, 8, 8]), strict=True):
                out[f"{m}conv1d.{kind}.{name}"] = part
        out[f"{m}norm.weight"] = t[f"{g}norm.weight"]
        out[f"{m}out_proj.weight"] = t[f"{g}out_proj.weight"]
    return out


def full_attention(t, m, h, out):
    """[groups, heads, 2, head_dim, hidden]: query and gate head by head."""
    q, gate = t[f"{h}self_attn.q_proj.weight"].reshape(2, 2, 2, 8, 32).unbind(2)
    k, v = (t[f"{h}self_attn.{name}_proj.weight"].reshape(2, 8, 32) for name in "kv")
    rows = [torch.cat([q[g].reshape(16, 32), gate[g].reshape(16, 32), k[g], v[g]]) for g in range(2)]
    out[f"{m}self_attention.linear_qkv.weight"] = torch.cat(rows)
    out[f"{m}self_attention.linear_qkv.layer_norm_weight"] = t[f"{h}input_layernorm.weight"]
    out[f"{m}self_attention.linear_proj.weight"] = t[f"{h}self_attn.o_proj.weight"]
    for name in "qk":
        out[f"{m}self_attention.{name}_layernorm.weight"] = t[f"{h}self_attn.{name}_norm.weight"]


def linear_attention(t, m, h, out):
    a, g = f"{m}self_attention.", f"{h}linear_attn."
    out[f"{a}in_proj.layer_norm_weight"] = t[f"{h}input_layernorm.weight"]
    qkvz = t[f"{g}in_proj_qkvz.weight"].reshape(2, 4 + 4 + 12 + 12, 32)
    for name, part in zip(("query", "key", "value", "z"), qkvz.split([4, 4, 12, 12], 1), strict=True):
        out[f"{a}in_proj.weight.{name}"] = part.reshape(-1, 32)
    for name, part in zip(("beta", "alpha"), t[f"{g}in_proj_ba.weight"].reshape(2, 4, 32).split(2, 1), strict=True):
        out[f"{a}in_proj.weight.{name}"] = part.reshape(-1, 32)
    for name, part in zip(("query", "key", "value"), t[f"{g}conv1d.weight"].split([8, 8, 24]), strict=True):
        out[f"{a}conv1d.weight.{name}"] = part
    for name in ("A_log", "dt_bias", "out_proj.weight"):
        out[f"{a}{name}"] = t[f"{g}{name}"]
    out[f"{a}out_norm.weight"] = t[f"{g}norm.weight"] - 1


def qwen3_next(t):
    out = outside(t)
    for number, (m, h) in enumerate(layers(t)):
        (full_attention if number == 2 else linear_attention)(t, m, h, out)
        out[f"{m}pre_mlp_layernorm.weight"] = t[f"{h}post_attention_layernorm.weight"]
        out[f"{m}mlp.router.weight"] = t[f"{h}mlp.gate.weight"]
        for e in range(4):
            gate, up = (t[f"{h}mlp.experts.{e}.{name}_proj.weight"] for name in ("gate", "up"))
            out[f"{m}mlp.experts.{e}.linear_fc1.weight"] = torch.cat([gate, up])
            out[f"{m}mlp.experts.{e}.linear_fc2.weight"] = t[f"{h}mlp.experts.{e}.down_proj.weight"]
        gate, up = (t[f"{h}mlp.shared_expert.{name}_proj.weight"] for name in ("gate", "up"))
        out[f"{m}mlp.shared_experts.linear_fc1.weight"] = torch.cat([gate, up])
        out[f"{m}mlp.shared_experts.linear_fc2.weight"] = t[f"{h}mlp.shared_expert.down_proj.weight"]
        out[f"{m}mlp.shared_experts.gate_weight"] = t[f"{h}mlp.shared_expert_gate.weight"]
    return out


ORACLES = {oracle.__name__: oracle for oracle in (qwen2, phi3, olmo, mixtral, gpt_oss, dbrx, mamba2, qwen3_next)}
