"""Qwen3, dense: 0.6B to 32B, pretrained on sequences of 4096 tokens."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, shape

COMMON: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def model(hidden: int, ffn: int, layers: int, heads: int, *, tied: bool = False) -> dict[str, Any]:
    """Return the `config.json` of a size."""
    return COMMON | shape(hidden, ffn, layers, heads, 8, max_window_layers=layers, tie_word_embeddings=tied)


RECIPES = (
    recipe("Qwen3 0.6B", model(1024, 3072, 28, 16, tied=True), pretrain=on(1, 18), sft=on(1, 18), peft=on(1, 9)),
    recipe("Qwen3 1.7B", model(2048, 6144, 28, 16, tied=True), pretrain=on(1, 42), sft=on(1, 42), peft=on(1, 15)),
    recipe("Qwen3 4B", model(2560, 9728, 36, 32, tied=True), pretrain=on(2, 67), sft=on(2, 67), peft=on(1, 28)),
    recipe("Qwen3 8B", model(4096, 12288, 36, 32), pretrain=on(4, 61, tp=2), sft=on(4, 61, tp=2), peft=on(1, 41)),
    recipe("Qwen3 14B", model(5120, 17408, 40, 40), pretrain=on(8, 52, tp=4), sft=on(8, 52, tp=4), peft=on(1, 64)),
    recipe(
        "Qwen3 32B", model(5120, 25600, 64, 64), pretrain=on(16, 58, tp=8), sft=on(16, 58, tp=8), peft=on(2, 70, tp=2), lr=1.5e-4
    ),
)
