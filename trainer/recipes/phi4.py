"""Phi-4: 14B and mini, on sequences of 4096 tokens: mini's rotary embeddings are the same for all lengths up to there."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, shape

COMMON: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "phi3",
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
MODEL_14B = COMMON | {
    "bos_token_id": 100257,
    "eos_token_id": 100257,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "pad_token_id": 100257,
    "rope_scaling": None,
    "rope_theta": 250000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
    **shape(5120, 17920, 40, 40, 10),
}
LONG_FACTOR = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898, 2.735880826,
    3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894,
    8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807,
    22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97,
    33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip
MODEL_MINI = COMMON | {
    "bos_token_id": 199999,
    "eos_token_id": 199999,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 199999,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"long_factor": LONG_FACTOR, "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
    **shape(3072, 8192, 32, 24, 8),
}

RECIPES = (
    recipe("Phi-4 14B", MODEL_14B, pretrain=on(8, 58, tp=2, pp=2), sft=on(8, 58, tp=2, pp=2), peft=on(1, 62)),
    recipe("Phi-4 mini", MODEL_MINI, pretrain=on(2, 62), sft=on(2, 62), peft=on(1, 24)),
)
