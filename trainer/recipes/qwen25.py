"""Qwen2.5: 0.5B to 72B, pretrained on sequences of 4096 tokens."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, shape

COMMON: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
}


def small(*numbers: int, positions: int) -> dict[str, Any]:
    """Return what 0.5B, 1.5B and 3B have."""
    return COMMON | {"tie_word_embeddings": True, "vocab_size": 151936} | _sized(*numbers, positions=positions)


def large(*numbers: int, eps: float = 1e-05) -> dict[str, Any]:
    """Return what 7B and larger ones have."""
    return COMMON | {"rms_norm_eps": eps, "tie_word_embeddings": False, "vocab_size": 152064} | _sized(*numbers, positions=131072)


def _sized(hidden: int, ffn: int, layers: int, heads: int, groups: int, *, positions: int) -> dict[str, Any]:
    window = {"max_position_embeddings": positions, "max_window_layers": layers, "sliding_window": positions}
    return shape(hidden, ffn, layers, heads, groups, **window)


RECIPES = (
    recipe("Qwen2.5 0.5B", small(896, 4864, 24, 14, 2, positions=32768), pretrain=on(1, 16), sft=on(1, 16), peft=on(1, 8)),
    recipe("Qwen2.5 1.5B", small(1536, 8960, 28, 12, 2, positions=131072), pretrain=on(1, 39), sft=on(1, 39), peft=on(1, 15)),
    recipe("Qwen2.5 3B", small(2048, 11008, 36, 16, 2, positions=32768), pretrain=on(2, 53), sft=on(2, 53), peft=on(1, 23)),
    recipe("Qwen2.5 7B", large(3584, 18944, 28, 28, 4, eps=1e-06), pretrain=on(4, 56, tp=2), sft=on(4, 56, tp=2), peft=on(1, 37)),
    recipe("Qwen2.5 14B", large(5120, 13824, 48, 40, 8), pretrain=on(8, 52, tp=4), sft=on(8, 52, tp=4), peft=on(1, 64)),
    recipe(
        "Qwen2.5 32B",
        large(5120, 27648, 64, 40, 8),
        pretrain=on(16, 57, tp=8),
        sft=on(16, 57, tp=8),
        peft=on(2, 67, tp=2),
        lr=1.5e-4,
    ),
    recipe(
        "Qwen2.5 72B",
        large(8192, 29568, 80, 64, 8),
        pretrain=on(32, 54, tp=8, pp=4),
        sft=on(32, 54, tp=8, pp=4),
        peft=on(4, 63, tp=4),
        lr=1.5e-4,
    ),
)
