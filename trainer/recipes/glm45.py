"""GLM-4.5 Air, pretrained on sequences of 4096 tokens."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, recomputed, shape

AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 151552,
    **shape(4096, 10944, 46, 96, 8),
}

RECIPES = (
    recipe(
        "GLM-4.5 Air",
        AIR,
        pretrain=on(64, 64, ep=32, pp=2, **recomputed()),
        sft=on(64, 64, ep=32, pp=2, **recomputed()),
        peft=on(8, 53, ep=8, **recomputed()),
    ),
)
