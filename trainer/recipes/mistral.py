"""Mistral: 7B v0.3, Nemo 12B and Small 24B, trained on sequences of 8192 tokens."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, shape

COMMON: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def model(hidden: int, ffn: int, layers: int, *, vocab: int, theta: float, positions: int) -> dict[str, Any]:
    """Return the `config.json` of a size."""
    read = {"max_position_embeddings": positions, "rope_theta": theta, "vocab_size": vocab}
    return COMMON | shape(hidden, ffn, layers, 32, 8, **read)


RECIPES = (
    recipe(
        "Mistral 7B",
        model(4096, 14336, 32, vocab=32768, theta=1e6, positions=32768),
        pretrain=on(4, 62, tp=2),
        sft=on(4, 53, tp=2),
        peft=on(1, 35),
        length=8192,
    ),
    recipe(
        "Mistral Nemo 12B",
        model(5120, 14336, 40, vocab=131072, theta=1e6, positions=131072),
        pretrain=on(4, 68, tp=4),
        sft=on(4, 62, tp=4),
        peft=on(1, 53),
        length=8192,
    ),
    recipe(
        "Mistral Small 24B",
        model(5120, 32768, 40, vocab=131072, theta=1e8, positions=32768),
        pretrain=on(8, 64, tp=8),
        sft=on(8, 59, tp=8),
        peft=on(2, 48, tp=2),
        length=8192,
        lr=1.5e-4,
    ),
)
