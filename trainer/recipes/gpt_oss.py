"""GPT-OSS 20B and 120B, pretrained on sequences of 4096 tokens."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, recomputed, shape


def model(layers: int, experts: int) -> dict[str, Any]:
    """Return the `config.json` of a size, in bf16."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "head_dim": 64,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_experts_per_tok": 4,
        "num_local_experts": experts,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 201088,
        **shape(2880, 2880, layers, 64, 8),
    }


MODEL_20B = model(24, 32)

RECIPES = (
    recipe(
        "GPT-OSS 20B",
        MODEL_20B,
        pretrain=on(8, 61, ep=8, **recomputed()),
        sft=on(8, 61, ep=8, **recomputed()),
        peft=on(1, 53, **recomputed()),
    ),
    recipe(
        "GPT-OSS 120B",
        model(36, 128),
        pretrain=on(64, 65, ep=16, pp=4),
        sft=on(64, 51, ep=16, pp=4),
        peft=on(8, 43, ep=8, **recomputed()),
    ),
)
