"""Llama 3: 8B and 70B, for sequences of 8192 tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.recipe import Recipe, pretraining, tuning_adapters, tuning_all

if TYPE_CHECKING:
    from trainer.config import RunConfig

COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
"""What the `config.json`s of Llama 3 and its successors share."""

MODEL_8B = COMMON | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "head_dim": 128,
}
MODEL_70B = COMMON | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "head_dim": 128,
}

LAYOUT_8B: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUT_70B: dict[str, Any] = {
    "tensor_model_parallel_size": 8,
    "pipeline_model_parallel_size": 4,
    "virtual_pipeline_model_parallel_size": 5,
    "sequence_parallel": True,
}
DIVIDED_8: dict[str, Any] = {"tensor_model_parallel_size": 8, "sequence_parallel": True}


def pretrain_8b() -> RunConfig:
    """Llama 3 8B from random weights, on 8 GPUs of 80 GB or any multiple of 2 from there.

    Per GPU at TP2·DP4: weights and gradients 8.03e9/2 × 6 = 24 GB, optimizer 8.03e9/2 × 12/4 = 12 GB, activations of 8192
    tokens 34 × 4096 × 8192 × 32/2 = 18 GB, logits 8192 × 128256/2 × 4 = 2 GB: 56 GB.
    """
    return pretraining(
        MODEL_8B, sequence_length=8192, global_batch_size=512, train_iters=1_200_000, lr=3e-4, min_lr=3e-5, **LAYOUT_8B
    )


def pretrain_70b() -> RunConfig:
    """Llama 3 70B from random weights, on 32 GPUs of 80 GB or any multiple.

    Per GPU at TP8·PP4·VPP5·DP1: weights and gradients 2.27e9 × 6 = 14 GB, optimizer 2.27e9 × 12 = 27 GB; the first stage, which
    has the embedding too, keeps 20 layers × 4 micro-batches × (1 + 3/20), 34 × 8192 × 8192 × 92/8 = 26 GB: 67 GB.
    """
    return pretraining(
        MODEL_70B, sequence_length=8192, global_batch_size=512, train_iters=1_200_000, lr=1.5e-4, min_lr=1.5e-5, **LAYOUT_70B
    )


def sft_8b() -> RunConfig:
    """All of Llama 3 8B, on 4 GPUs of 80 GB or any power of 2 from there.

    Per GPU at TP2·DP2: weights and gradients 8.03e9/2 × 6 = 24 GB, optimizer 8.03e9/2 × 12/2 = 24 GB, activations of 4096
    tokens 34 × 4096 × 4096 × 32/2 = 9 GB, logits 4096 × 128256/2 × 4 = 1 GB: 58 GB.
    """
    return tuning_all(MODEL_8B, **LAYOUT_8B)


def peft_8b() -> RunConfig:
    """Adapters of Llama 3 8B, on one GPU of 80 GB or any power of 2.

    On one GPU: frozen weights 8.03e9 × 2 = 16 GB, adapters 7.1e7 × 18 = 1 GB, activations of 4096 tokens 34 × 4096 × 4096 × 32 =
    18 GB, logits 4096 × 128256 × 4 = 2 GB: 38 GB.
    """
    return tuning_adapters(MODEL_8B)


def sft_70b() -> RunConfig:
    """All of Llama 3 70B, on 32 GPUs of 80 GB or any power of 2 from there.

    Per GPU at TP8·PP4·VPP5·DP1: weights and gradients 2.27e9 × 6 = 14 GB, optimizer 2.27e9 × 12 = 27 GB; the first stage keeps
    20 layers × 4 micro-batches × (1 + 3/20), 34 × 8192 × 4096 × 92/8 = 13 GB: 54 GB.
    """
    return tuning_all(MODEL_70B, **LAYOUT_70B)


def peft_70b() -> RunConfig:
    """Adapters of Llama 3 70B, on 8 GPUs of 80 GB or any power of 2 from there.

    Per GPU at TP8·DP1: frozen weights 70.6e9/8 × 2 = 18 GB, adapters, one matrix of each pair whole on every rank, 1.2e8 × 18 =
    2 GB, activations of 4096 tokens 34 × 8192 × 4096 × 80/8 = 11 GB: 31 GB.
    """
    return tuning_adapters(MODEL_70B, **DIVIDED_8)


RECIPES = (
    Recipe(
        name="llama3_8b",
        model=MODEL_8B,
        layout=LAYOUT_8B,
        pretrain_config=pretrain_8b,
        sft_config=sft_8b,
        peft_config=peft_8b,
        gpus=8,
        sft_gpus=4,
        peft_gpus=1,
    ),
    Recipe(
        name="llama3_70b",
        model=MODEL_70B,
        layout=LAYOUT_70B,
        pretrain_config=pretrain_70b,
        sft_config=sft_70b,
        peft_config=peft_70b,
        gpus=32,
        sft_gpus=32,
        peft_gpus=8,
    ),
)
