"""A Llama small enough for a laptop: to try things, and for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.recipe import Recipe, pretraining, tuning_adapters, tuning_all
from trainer.recipes import llama3

if TYPE_CHECKING:
    from trainer.config import RunConfig

MODEL: dict[str, Any] = llama3.COMMON | {
    "bos_token_id": None,
    "eos_token_id": 256,
    "head_dim": 32,
    "hidden_size": 256,
    "intermediate_size": 768,
    "max_position_embeddings": 256,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "vocab_size": 257,
}
"""Its tokens are bytes, and one that ends a document."""


def pretrain() -> RunConfig:
    """A Llama of 3 million parameters over bytes, in fp32, on a CPU in about a minute.

    Weights, gradients and optimizer 3.3e6 × 16 = 0.05 GB.
    """
    config = pretraining(MODEL, sequence_length=256, global_batch_size=8, train_iters=100, lr=1e-3, min_lr=1e-4)
    config.scheduler.lr_warmup_fraction = 0.1
    return _for_cpu(config)


def sft() -> RunConfig:
    """All of a tiny model, on a CPU in about a minute."""
    config = tuning_all(MODEL, sequence_length=256)
    config.optimizer.lr = 1e-3
    return _for_cpu(config)


def peft() -> RunConfig:
    """Adapters of a tiny model, on a CPU in about a minute."""
    config = tuning_adapters(MODEL, sequence_length=256)
    config.optimizer.lr, config.peft.dim, config.peft.alpha = 1e-2, 8, 16
    return _for_cpu(config)


def _for_cpu(config: RunConfig) -> RunConfig:
    """In fp32, for a CPU: one optimizer for all, since ranks have no memory to save."""
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = 100, 8, 2
    config.mixed_precision = "fp32"
    config.tokenizer.tokenizer_model = "byte"
    config.ddp.use_distributed_optimizer = config.optimizer.use_distributed_optimizer = False
    config.validation.eval_iters = 2
    return config


RECIPES = (
    Recipe(
        name="llama_tiny",
        model=MODEL,
        precision="fp32",
        pretrain_config=pretrain,
        sft_config=sft,
        peft_config=peft,
        gpus=0,
        sft_gpus=0,
        peft_gpus=0,
    ),
)
