"""Gemma 3: 270M and 1B, and the language models of 4B, 12B and 27B, trained on sequences of 8192 tokens."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, shape

COMMON: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
}
LONG: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
    "vocab_size": 262208,
}
"""What `text_config` of 4B and larger ones has otherwise."""

LARGE: dict[str, Any] = {"head_dim": 128, "query_pre_attn_scalar": 168}
"""What 27B has otherwise."""

RECIPES = (
    recipe("Gemma3 270M", COMMON | shape(640, 2048, 18, 4, 1), pretrain=on(1, 17), sft=on(1, 11), peft=on(1, 7), length=8192),
    recipe("Gemma3 1B", COMMON | shape(1152, 6912, 26, 4, 1), pretrain=on(1, 39), sft=on(1, 29), peft=on(1, 13), length=8192),
    recipe(
        "Gemma3 4B", COMMON | LONG | shape(2560, 10240, 34, 8, 4), pretrain=on(4, 72), sft=on(2, 65), peft=on(1, 27), length=8192
    ),
    recipe(
        "Gemma3 12B",
        COMMON | LONG | shape(3840, 15360, 48, 16, 8),
        pretrain=on(4, 71, tp=4),
        sft=on(4, 62, tp=4),
        peft=on(1, 61),
        length=8192,
    ),
    recipe(
        "Gemma3 27B",
        COMMON | LONG | LARGE | shape(5376, 21504, 62, 32, 16),
        pretrain=on(16, 55, tp=8),
        sft=on(8, 68, tp=8),
        peft=on(2, 58, tp=2),
        length=8192,
        lr=1.5e-4,
    ),
)
