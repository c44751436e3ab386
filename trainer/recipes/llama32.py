"""Llama 3.2: 1B and 3B, for up to 131072 tokens; embedding and output layer are one tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.recipe import Recipe, pretraining, tuning_adapters, tuning_all
from trainer.recipes import llama3, llama31

if TYPE_CHECKING:
    from trainer.config import RunConfig

SMALL: dict[str, Any] = (
    llama3.COMMON | llama31.LONG | {"rope_scaling": llama31.LONG["rope_scaling"] | {"factor": 32.0}, "tie_word_embeddings": True}
)
MODEL_1B = SMALL | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "head_dim": 64,
}
MODEL_3B = SMALL | {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
    "head_dim": 128,
}


def pretrain_1b() -> RunConfig:
    """Llama 3.2 1B from random weights, on one GPU of 80 GB or any number.

    On one GPU: weights and gradients 1.24e9 × 6 = 7 GB, optimizer 1.24e9 × 12 = 15 GB, activations of 8192 tokens 38 × 2048 ×
    8192 × 16 = 10 GB, logits 8192 × 128256 × 4 = 4 GB: 36 GB.
    """
    return pretraining(MODEL_1B, sequence_length=8192, global_batch_size=512, train_iters=1_200_000, lr=3e-4, min_lr=3e-5)


def pretrain_3b() -> RunConfig:
    """Llama 3.2 3B from random weights, on 4 GPUs of 80 GB or any number from there.

    Per GPU at DP4: weights and gradients 3.21e9 × 6 = 19 GB, optimizer 3.21e9 × 12/4 = 10 GB, activations of 8192 tokens 30 ×
    3072 × 8192 × 28 = 21 GB, logits 8192 × 128256 × 4 = 4 GB: 54 GB.
    """
    return pretraining(MODEL_3B, sequence_length=8192, global_batch_size=512, train_iters=1_200_000, lr=3e-4, min_lr=3e-5)


def sft_1b() -> RunConfig:
    """All of Llama 3.2 1B, on one GPU of 80 GB or any power of 2.

    On one GPU: weights and gradients 1.24e9 × 6 = 7 GB, optimizer 1.24e9 × 12 = 15 GB, activations of 4096 tokens 38 × 2048 ×
    4096 × 16 = 5 GB, logits 4096 × 128256 × 4 = 2 GB: 29 GB.
    """
    return tuning_all(MODEL_1B)


def peft_1b() -> RunConfig:
    """Adapters of Llama 3.2 1B, on one GPU of 80 GB or any power of 2.

    On one GPU: frozen weights 1.24e9 × 2 = 2.5 GB, adapters 1.9e7 × 18 = 0.3 GB, activations of 4096 tokens 38 × 2048 × 4096 ×
    16 = 5 GB, logits 4096 × 128256 × 4 = 2 GB: 10 GB.
    """
    return tuning_adapters(MODEL_1B)


def sft_3b() -> RunConfig:
    """All of Llama 3.2 3B, on one GPU of 80 GB or any power of 2.

    On one GPU: weights and gradients 3.21e9 × 6 = 19 GB, optimizer 3.21e9 × 12 = 39 GB, activations of 4096 tokens 30 × 3072 ×
    4096 × 28 = 10 GB, logits 4096 × 128256 × 4 = 2 GB: 70 GB.
    """
    return tuning_all(MODEL_3B)


def peft_3b() -> RunConfig:
    """Adapters of Llama 3.2 3B, on one GPU of 80 GB or any power of 2.

    On one GPU: frozen weights 3.21e9 × 2 = 6 GB, adapters 4.0e7 × 18 = 1 GB, activations of 4096 tokens 30 × 3072 × 4096 × 28 =
    10 GB, logits 4096 × 128256 × 4 = 2 GB: 20 GB.
    """
    return tuning_adapters(MODEL_3B)


RECIPES = (
    Recipe(
        name="llama32_1b",
        model=MODEL_1B,
        pretrain_config=pretrain_1b,
        sft_config=sft_1b,
        peft_config=peft_1b,
        gpus=1,
        sft_gpus=1,
        peft_gpus=1,
    ),
    Recipe(
        name="llama32_3b",
        model=MODEL_3B,
        pretrain_config=pretrain_3b,
        sft_config=sft_3b,
        peft_config=peft_3b,
        gpus=4,
        sft_gpus=1,
        peft_gpus=1,
    ),
)
