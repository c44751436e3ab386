"""Run your own code between steps: stop when validation no longer improves, and log the norm of the weights.

    python examples/callback.py
    torchrun --nproc-per-node 2 examples/callback.py

A callback may define any of `on_start`, `on_step`, `on_evaluation`, `on_save` and `on_end`. Every rank calls each of them, so
collectives are allowed in them.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from trainer import Callback, Run, RunConfig, Step, pretrain
from trainer.loop import say
from trainer.recipes import llama_tiny


class EarlyStopping(Callback):
    """Stops the run after `patience` consecutive evaluations that do not improve the best loss by `improvement`."""

    def __init__(self, *, patience: int = 2, improvement: float = 0.02) -> None:
        self.patience, self.improvement = patience, improvement
        self.best, self.worse = math.inf, 0

    def on_evaluation(self, run: Run, split: str, loss: float) -> None:
        """Compare the validation loss with the best. It is the same on all ranks, so all ranks stop together."""
        if split != "validation":
            return
        better = loss < self.best - self.improvement
        self.best, self.worse = min(self.best, loss), 0 if better else self.worse + 1
        if self.worse >= self.patience:
            say(f"validation has not improved on {self.best:.3f} for {self.worse} evaluations")
            run.stop.request()


class WeightNorms(Callback):
    """Logs the norm of all weights, every `every` steps."""

    def __init__(self, *, every: int = 5) -> None:
        self.every = every

    def on_step(self, run: Run, step: Step) -> None:  # noqa: ARG002 - part of the interface
        """Sum the squares over model-parallel ranks, counting replicated parameters once."""
        if run.progress.iteration % self.every:
            return
        parameters = [
            param for chunk in run.chunks for param in chunk.parameters() if param_is_not_tensor_parallel_duplicate(param)
        ]
        squares = torch.stack([param.detach().float().square().sum() for param in parameters]).sum()
        dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
        say(f"step {run.progress.iteration}: the weights' norm is {squares.sqrt().item():.3f}")


def settings() -> RunConfig:
    """Return a run of a tiny Llama with a learning rate so high that validation soon stops improving."""
    config = llama_tiny.pretrain_config()
    config.train.train_iters = 200
    config.dataset.sequence_length = 32
    config.dataset.num_workers = 0
    config.validation.eval_interval = 5
    config.optimizer.lr = config.optimizer.min_lr = 0.05
    return config


if __name__ == "__main__":
    pretrain(settings(), callbacks=[EarlyStopping(), WeightNorms()])
