"""Mixtral 8x7B, pretrained on sequences of 4096 tokens."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, recomputed, shape

MODEL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
} | shape(4096, 14336, 32, 32, 8)

RECIPES = (
    recipe(
        "Mixtral 8x7B",
        MODEL_8X7B,
        pretrain=on(16, 59, ep=8, pp=2, **recomputed()),
        sft=on(16, 59, ep=8, pp=2, **recomputed()),
        peft=on(2, 55, ep=2, **recomputed()),
    ),
)
