"""Llama 3.1: 8B, 70B and 405B, for up to 131072 tokens, pretrained on sequences of 8192."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.recipe import Recipe, pretraining, tuning_adapters, tuning_all
from trainer.recipes import llama3

if TYPE_CHECKING:
    from trainer.config import RunConfig

LONG: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
"""What 3.1 has in `config.json` that 3 had not."""

MODEL_8B = llama3.MODEL_8B | LONG
MODEL_70B = llama3.MODEL_70B | LONG
MODEL_405B = (
    llama3.COMMON
    | LONG
    | {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_attention_heads": 128,
        "num_hidden_layers": 126,
        "head_dim": 128,
    }
)

LAYOUT_405B: dict[str, Any] = llama3.DIVIDED_8 | {
    "pipeline_model_parallel_size": 16,
    "virtual_pipeline_model_parallel_size": 2,
    "context_parallel_size": 4,
    "account_for_embedding_in_pipeline_split": True,
    "account_for_loss_in_pipeline_split": True,
}
SHORTER_405B: dict[str, Any] = LAYOUT_405B | {"context_parallel_size": 2}
ADAPTERS_405B: dict[str, Any] = llama3.DIVIDED_8 | {
    "pipeline_model_parallel_size": 4,
    "account_for_embedding_in_pipeline_split": True,
    "account_for_loss_in_pipeline_split": True,
}


def pretrain_8b() -> RunConfig:
    """Llama 3.1 8B from random weights, on 8 GPUs of 80 GB or any multiple of 2 from there.

    Per GPU at TP2·DP4: 57 GB, as Llama 3 8B.
    """
    return pretraining(
        MODEL_8B, sequence_length=8192, global_batch_size=512, train_iters=1_200_000, lr=3e-4, min_lr=3e-5, **llama3.LAYOUT_8B
    )


def pretrain_70b() -> RunConfig:
    """Llama 3.1 70B from random weights, on 32 GPUs of 80 GB or any multiple.

    Per GPU at TP8·PP4·VPP5·DP1: 67 GB, as Llama 3 70B.
    """
    return pretraining(
        MODEL_70B,
        sequence_length=8192,
        global_batch_size=512,
        train_iters=1_200_000,
        lr=1.5e-4,
        min_lr=1.5e-5,
        **llama3.LAYOUT_70B,
    )


def pretrain_405b() -> RunConfig:
    """Llama 3.1 405B from random weights, on 512 GPUs of 80 GB or any multiple.

    Embedding and output layer count as layers, so that 128 divide into 16 stages of 2 × 4. Per GPU at TP8·PP16·VPP2·CP4·DP1:
    weights and gradients 3.19e9 × 6 = 19 GB, optimizer 3.19e9 × 12/4 = 10 GB; the fullest stage keeps 8 layers of 22.5
    micro-batches, 32 × 16384 × 8192/4 × 8 × 22.5/8 = 24 GB: 53 GB.
    """
    return pretraining(
        MODEL_405B,
        sequence_length=8192,
        global_batch_size=512,
        train_iters=1_200_000,
        lr=8e-5,
        min_lr=8e-7,
        **LAYOUT_405B,
    )


def sft_8b() -> RunConfig:
    """All of Llama 3.1 8B, on 4 GPUs of 80 GB or any power of 2 from there.

    Per GPU at TP2·DP2: 58 GB, as Llama 3 8B.
    """
    return tuning_all(MODEL_8B, **llama3.LAYOUT_8B)


def peft_8b() -> RunConfig:
    """Adapters of Llama 3.1 8B, on one GPU of 80 GB or any power of 2.

    On one GPU: 38 GB, as Llama 3 8B.
    """
    return tuning_adapters(MODEL_8B)


def sft_70b() -> RunConfig:
    """All of Llama 3.1 70B, on 32 GPUs of 80 GB or any power of 2 from there.

    Per GPU at TP8·PP4·VPP5·DP1: 54 GB, as Llama 3 70B.
    """
    return tuning_all(MODEL_70B, **llama3.LAYOUT_70B)


def peft_70b() -> RunConfig:
    """Adapters of Llama 3.1 70B, on 8 GPUs of 80 GB or any power of 2 from there.

    Per GPU at TP8·DP1: 31 GB, as Llama 3 70B.
    """
    return tuning_adapters(MODEL_70B, **llama3.DIVIDED_8)


def sft_405b() -> RunConfig:
    """All of Llama 3.1 405B, on 256 GPUs of 80 GB or any power of 2 from there.

    Per GPU at TP8·PP16·VPP2·CP2·DP1: weights and gradients 3.19e9 × 6 = 19 GB, optimizer 3.19e9 × 12/2 = 19 GB; the fullest
    stage keeps 8 layers of 22.5 micro-batches, 32 × 16384 × 4096/2 × 8 × 22.5/8 = 24 GB: 62 GB.
    """
    return tuning_all(MODEL_405B, **SHORTER_405B)


def peft_405b() -> RunConfig:
    """Adapters of Llama 3.1 405B, on 32 GPUs of 80 GB or any power of 2 from there.

    Per GPU at TP8·PP4·DP1: frozen weights of the first stage, 31 layers and the embedding, 12.6e9 × 2 = 25 GB, adapters 8.9e7 ×
    18 = 2 GB, activations of 4 micro-batches of 4096 tokens 32 × 16384 × 4096 × 31 × 4/8 = 33 GB: 60 GB.
    """
    return tuning_adapters(MODEL_405B, **ADAPTERS_405B)


RECIPES = (
    Recipe(
        name="llama31_8b",
        model=MODEL_8B,
        layout=llama3.LAYOUT_8B,
        pretrain_config=pretrain_8b,
        sft_config=sft_8b,
        peft_config=peft_8b,
        gpus=8,
        sft_gpus=4,
        peft_gpus=1,
    ),
    Recipe(
        name="llama31_70b",
        model=MODEL_70B,
        layout=llama3.LAYOUT_70B,
        pretrain_config=pretrain_70b,
        sft_config=sft_70b,
        peft_config=peft_70b,
        gpus=32,
        sft_gpus=32,
        peft_gpus=8,
    ),
    Recipe(
        name="llama31_405b",
        model=MODEL_405B,
        layout=LAYOUT_405B,
        pretrain_config=pretrain_405b,
        sft_config=sft_405b,
        peft_config=peft_405b,
        gpus=512,
        sft_gpus=256,
        peft_gpus=32,
    ),
)
