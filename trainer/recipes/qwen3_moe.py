"""Qwen3 with experts: 30B-A3B and 235B-A22B, pretrained on sequences of 4096 tokens."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, recomputed, shape

COMMON: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def model(hidden: int, ffn: int, expert_ffn: int, layers: int, heads: int) -> dict[str, Any]:
    """Return the `config.json` of a size; `expert_ffn` is the inner size of one expert."""
    return COMMON | shape(hidden, ffn, layers, heads, 4, max_window_layers=layers, moe_intermediate_size=expert_ffn)


MODEL_30B = model(2048, 6144, 768, 48, 32)
EVEN = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
"""94 layers, the embedding and the loss divide into 8 stages."""

RECIPES = (
    recipe(
        "Qwen3 30B-A3B",
        MODEL_30B,
        pretrain=on(16, 68, ep=16),
        sft=on(16, 68, ep=16),
        peft=on(2, 48, ep=2, **recomputed()),
    ),
    recipe(
        "Qwen3 235B-A22B",
        model(4096, 12288, 1536, 94, 64),
        pretrain=on(128, 44, ep=16, pp=8, **EVEN, **recomputed()),
        sft=on(128, 43, ep=16, pp=8, **EVEN, **recomputed()),
        peft=on(16, 47, ep=8, pp=2, **recomputed()),
        lr=1.5e-4,
    ),
)
