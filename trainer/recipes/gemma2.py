"""Gemma 2: 2B, 9B and 27B, for sequences of 8192 tokens."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, shape

COMMON: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256000,
}
LARGE: dict[str, Any] = {"head_dim": 128, "query_pre_attn_scalar": 144}
"""What 27B has otherwise."""
AGAIN: dict[str, Any] = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
"""Scores of attention, which are capped, are computed again: without flash-attn they are all in memory."""

RECIPES = (
    recipe(
        "Gemma2 2B",
        COMMON | shape(2304, 9216, 26, 8, 4),
        pretrain=on(2, 65, **AGAIN),
        sft=on(2, 48, **AGAIN),
        peft=on(1, 22, **AGAIN),
        length=8192,
    ),
    recipe(
        "Gemma2 9B",
        COMMON | shape(3584, 14336, 42, 16, 8),
        pretrain=on(4, 58, tp=4, **AGAIN),
        sft=on(4, 50, tp=4, **AGAIN),
        peft=on(1, 52, **AGAIN),
        length=8192,
    ),
    recipe(
        "Gemma2 27B",
        COMMON | LARGE | shape(4608, 36864, 46, 32, 16),
        pretrain=on(16, 57, tp=8, **AGAIN),
        sft=on(8, 69, tp=8, **AGAIN),
        peft=on(2, 60, tp=2, **AGAIN),
        length=8192,
        lr=1.5e-4,
    ),
)
