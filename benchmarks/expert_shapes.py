"""Mixtures of experts to measure on one GPU of 80 GB: shapes of published models with fewer layers, and settings of their runs.

Random weights send tokens to few experts, so routing is balanced by force, in all programs that train all parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False, "attention_bias": False,
    "attention_dropout": 0.0, "use_sliding_window": False, "initializer_range": 0.02,
}  # fmt: skip
"""Qwen3-30B-A3B."""

GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 2880, "num_hidden_layers": 24,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32,
    "num_experts_per_tok": 4, "hidden_act": "silu", "swiglu_limit": 7.0, "rms_norm_eps": 1e-5, "sliding_window": 128,
    "vocab_size": 201088, "max_position_embeddings": 131072, "tie_word_embeddings": False, "attention_bias": True,
    "attention_dropout": 0.0, "rope_theta": 150000.0, "initializer_range": 0.02,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                     "original_max_position_embeddings": 4096},
}  # fmt: skip
"""GPT-OSS-20B."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model with layers left out, and the batch that it is measured on."""

    config: dict[str, Any]
    layers: tuple[int, ...]
    """How many layers to try, until they fit: 18 bytes for each parameter that is trained, 2 for a frozen one."""

    sequence: int = 4096
    micro_batch: int = 1
    microbatches: int = 4


SHAPES = {"qwen3-30b": Shape(QWEN3, (5, 4)), "gpt-oss-20b": Shape(GPT_OSS, (3, 2))}
LORA = Shape(QWEN3, (16, 8))
ROWS = 2
"""Rows of a step of LoRA."""
PRECISIONS = {
    "bf16": {"mixed_precision": "bf16_mixed"},
    "fp8": {"mixed_precision": "bf16_with_fp8_current_scaling_mixed", "model.first_last_layers_bf16": False},
}


def config_of(shape: Shape, layers: int) -> dict[str, Any]:
    """Return the `config.json` of a shape with so many layers."""
    return {**shape.config, "num_hidden_layers": layers}


def settings(shape: Shape, precision: str, gpus: int = 1) -> dict[str, Any]:
    """Return the settings of a run, by their names with dots, that both programs have. GPUs share the experts, not the batch."""
    return {
        **PRECISIONS[precision],
        "model.moe_router_force_load_balancing": True,
        "model.expert_model_parallel_size": gpus,
        "dataset.sequence_length": shape.sequence,
        "train.micro_batch_size": shape.micro_batch,
        "train.global_batch_size": shape.micro_batch * shape.microbatches * gpus,
        "ddp.use_distributed_optimizer": True,
        "optimizer.lr": 1e-4,
        "optimizer.clip_grad": 1.0,
    }
