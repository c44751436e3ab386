"""Granite 3.3: 2B and 8B, trained on sequences of 4096 tokens."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, shape

COMMON: dict[str, Any] = {
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49159,
}
SMALL: dict[str, Any] = {"attention_multiplier": 0.015625, "logits_scaling": 8.0}
LARGE: dict[str, Any] = {"attention_multiplier": 0.0078125, "logits_scaling": 16.0}

RECIPES = (
    recipe("Granite3 2B", COMMON | SMALL | shape(2048, 8192, 40, 32, 8), pretrain=on(1, 59), sft=on(1, 59), peft=on(1, 19)),
    recipe(
        "Granite3 8B",
        COMMON | LARGE | shape(4096, 12800, 40, 32, 8),
        pretrain=on(4, 60, tp=2),
        sft=on(4, 60, tp=2),
        peft=on(1, 40),
    ),
)
