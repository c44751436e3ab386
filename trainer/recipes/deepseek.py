"""DeepSeek-V2-Lite and V3, and Moonlight, which has V3's layers: pretrained on sequences of 4096 tokens."""

from __future__ import annotations

from typing import Any

from trainer.recipe import on, recipe, recomputed, shape

COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
}
SIXTEEN_B: dict[str, Any] = COMMON | {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
    "topk_group": 1,
}


def long_rope(factor: float) -> dict[str, Any]:
    """Return the `rope_scaling` to 163,840 positions; `factor` is what attention's scores are scaled with."""
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": factor,
        "mscale_all_dim": factor,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }


V2_LITE = SIXTEEN_B | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "norm_topk_prob": False,
    "rope_scaling": long_rope(0.707),
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_method": "greedy",
    "vocab_size": 102400,
    **shape(2048, 10944, 27, 16, 16),
}
SIGMOID: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
MOONLIGHT = SIXTEEN_B | SIGMOID | {
    "max_position_embeddings": 8192,
    "num_nextn_predict_layers": 0,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "vocab_size": 163840,
    **shape(2048, 11264, 27, 16, 16),
}  # fmt: skip
V3 = COMMON | SIGMOID | {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rope_scaling": long_rope(1.0),
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "vocab_size": 129280,
    **shape(7168, 18432, 61, 128, 128),
}  # fmt: skip

STAGES = "Et*3|(tttt|)*14ttmL"
"""16 pipeline stages: the last has few layers beside those of multi-token prediction and the loss."""

RECIPES = (
    recipe("DeepSeek V2-Lite", V2_LITE, pretrain=on(8, 58, ep=8), sft=on(8, 58, ep=8), peft=on(1, 55)),
    recipe(
        "DeepSeek V3",
        V3,
        pretrain=on(256, 63, ep=16, pp=16, pipeline_model_parallel_layout=STAGES, **recomputed()),
        sft=on(256, 63, ep=16, pp=16, pipeline_model_parallel_layout=STAGES, **recomputed()),
        peft=on(64, 51, ep=32, pp=2, pipeline_model_parallel_layout="Et*31|t*30mL", **recomputed()),
        lr=2.2e-4,
    ),
    recipe("Moonlight 16B-A3B", MOONLIGHT, pretrain=on(8, 61, ep=8), sft=on(8, 61, ep=8), peft=on(1, 57)),
)
"""V3's rate is its report's (arXiv:2412.19437, section 4.2)."""
