"""GLM-4-0414: 9B and 32B, trained on sequences of 4096 tokens. Two groups of keys and values: at most TP2."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, shape

COMMON: dict[str, Any] = {
    "architectures": ["Glm4ForCausalLM"],
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "glm4",
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 151552,
}
UNEVEN: dict[str, Any] = {"num_layers_in_last_pipeline_stage": 5}
"""32B's 61 layers over 8 stages: 7 × 8 + 5."""

RECIPES = (
    recipe(
        "GLM-4 9B",
        COMMON | shape(4096, 13696, 40, 32, 2, attention_bias=True),
        pretrain=on(4, 69, tp=2),
        sft=on(4, 69, tp=2),
        peft=on(1, 45),
    ),
    recipe(
        "GLM-4 32B",
        COMMON | shape(6144, 23040, 61, 48, 2, attention_bias=False),
        pretrain=on(32, 58, tp=2, pp=8, **UNEVEN),
        sft=on(32, 58, tp=2, pp=8, **UNEVEN),
        peft=on(2, 63, tp=2),
        lr=1.5e-4,
    ),
)
