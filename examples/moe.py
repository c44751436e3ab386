"""Train a mixture of experts: each token is routed to 2 of 4 experts, in one process or with expert parallelism.

    python examples/moe.py
    torchrun --nproc-per-node 2 examples/moe.py --ep 2    # two experts in each process

From the same weights, both give the same losses (`--save` writes weights, `--start` loads them); each process draws random
weights for its own experts. On a GPU all experts of a rank are computed at once.
"""

from __future__ import annotations

import argparse

import torch

from trainer import GPTModelProvider, RunConfig, pretrain
from trainer.config import DatasetConfig


def settings(*, ep: int = 1, save: str | None = None, start: str | None = None) -> RunConfig:
    """Return a run of a model without a `config.json`: the fields of megatron-core that differ from their defaults."""
    model = GPTModelProvider(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        vocab_size=256,
        seq_length=64,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=64,
        moe_aux_loss_coeff=1e-2,
        expert_model_parallel_size=ep,
    )
    config = RunConfig(model=model, mixed_precision="fp32")
    config.dataset = DatasetConfig(sequence_length=32, num_workers=0)
    config.train.train_iters, config.train.global_batch_size = 10, 4
    config.optimizer.lr = 5e-3
    config.validation.eval_iters = 0
    config.logger.log_interval = 1
    config.checkpoint.save, config.checkpoint.pretrained_checkpoint = save, start
    return config


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--save")
    parser.add_argument("--start")
    pretrain(settings(**vars(parser.parse_args())))
