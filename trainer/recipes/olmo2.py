"""OLMo 2: 1B, 7B, 13B and 32B, for sequences of 4096 tokens."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, shape

COMMON: dict[str, Any] = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 100352,
}

RECIPES = (
    recipe("OLMo2 1B", COMMON | shape(2048, 8192, 16, 16, 16), pretrain=on(1, 34), sft=on(1, 34), peft=on(1, 11)),
    recipe("OLMo2 7B", COMMON | shape(4096, 11008, 32, 32, 32), pretrain=on(4, 54, tp=2), sft=on(4, 54, tp=2), peft=on(1, 37)),
    recipe("OLMo2 13B", COMMON | shape(5120, 13824, 40, 40, 40), pretrain=on(4, 70, tp=4), sft=on(4, 70, tp=4), peft=on(1, 62)),
    recipe(
        "OLMo2 32B",
        COMMON | shape(5120, 27648, 64, 40, 8),
        pretrain=on(16, 57, tp=8),
        sft=on(16, 57, tp=8),
        peft=on(2, 68, tp=2),
        lr=1.5e-4,
    ),
)
