"""Write your own forward step: cross entropy with a z-loss, correct under tensor and pipeline parallelism.

    python examples/forward_step.py
    torchrun --nproc-per-node 2 examples/forward_step.py --tp 2    # the same losses

The z-loss (PaLM, arXiv:2204.02311, section 5) keeps the logarithm of the softmax's denominator Z near 0: it adds
coefficient × log²Z to each token's loss.

A forward step takes an iterator of batches (None for chunks in the middle of a pipeline) and a model chunk. It returns the
chunk's output and a loss function. The loss function returns the sum over the tokens that count, their number, and both in one
tensor for the log. megatron-core calls it on the last pipeline stage only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from trainer import RunConfig, pretrain
from trainer.loss import Batch, LossFunction, masked_sum, on_this_rank
from trainer.model import unwrap
from trainer.recipes import llama_tiny

COEFFICIENT = 1e-2
"""A hundred times PaLM's, so that the effect shows in ten steps."""


def z_loss_step(batches: Iterator[Batch] | None, model: Any) -> tuple[torch.Tensor, LossFunction]:
    """Run a microbatch. Without `labels`, a chunk returns logits [micro batch, sequence, this rank's part of the vocabulary]."""
    batch = on_this_rank(next(batches)) if batches is not None else {}
    logits = model(batch.get("tokens"), batch.get("position_ids"), None)
    return logits, partial(z_loss, model=unwrap(model), batch=batch)


def z_loss(logits: torch.Tensor, *, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return cross entropy plus z-loss, summed over the tokens that count, and their number."""
    logits = model.without_padding(logits)  # padding rows of the vocabulary are not a part of Z
    log_z = log_sum_exp(logits)
    # Last, since megatron-core's cross entropy overwrites its logits [sequence, micro batch, vocabulary].
    losses = model.compute_language_model_loss(batch["labels"], logits.transpose(0, 1).contiguous())
    return masked_sum(losses + COEFFICIENT * log_z**2, mask=batch["loss_mask"])


def log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """Return log Z [micro batch, sequence] over the whole vocabulary, which is sharded over tensor-parallel ranks."""
    largest = logits.detach().amax(dim=-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    total = (logits - largest.unsqueeze(-1)).exp().sum(dim=-1)
    return largest + reduce_from_tensor_model_parallel_region(total).log()


def settings(tp: int = 1) -> RunConfig:
    """Return a run of a tiny Llama over bytes, ten steps."""
    config = llama_tiny.pretrain_config()
    config.model.tensor_model_parallel_size = tp
    config.train.train_iters = 10
    config.dataset.sequence_length = 64
    config.dataset.num_workers = 0
    config.validation.eval_iters = 0
    config.logger.log_interval = 1
    return config


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1)
    pretrain(settings(parser.parse_args().tp), z_loss_step)
