"""Your own code between steps: a run that stops when validation no longer improves, and logs the norm of its weights.

    python examples/callback.py
    torchrun --nproc-per-node 2 examples/callback.py

A callback may define any of `on_start`, `on_step`, `on_evaluation`, `on_save` and `on_end`. Every rank calls each of them, so
that they may communicate.
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
    """Ends the run after `patience` evaluations in a row that were not better than the best by `improvement`."""

    def __init__(self, *, patience: int = 2, improvement: float = 0.02) -> None:
        self.patience, self.improvement = patience, improvement
        self.best, self.worse = math.inf, 0

    def on_evaluation(self, run: Run, split: str, loss: float) -> None:
        """The loss is the same on all ranks, so all of them decide alike."""
        if split != "validation":
            return
        better = loss < self.best - self.improvement
        self.best, self.worse = min(self.best, loss), 0 if better else self.worse + 1
        if self.worse >= self.patience:
            say(f"validation has not improved on {self.best:.3f} for {self.worse} evaluations")
            run.stop.request()


class WeightNorms(Callback):
    """The norm of all weights, every so many steps."""

    def __init__(self, *, every: int = 5) -> None:
        self.every = every

    def on_step(self, run: Run, step: Step) -> None:  # noqa: ARG002 - the seam's
        """Ranks hold parts of a layer, layers, or copies of both; each part counts once."""
        if run.progress.iteration % self.every:
            return
        mine = [one for chunk in run.chunks for one in chunk.parameters() if param_is_not_tensor_parallel_duplicate(one)]
        squares = torch.stack([one.detach().float().square().sum() for one in mine]).sum()
        dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
        say(f"step {run.progress.iteration}: the weights' norm is {squares.sqrt().item():.3f}")


def settings() -> RunConfig:
    """A tiny Llama with a learning rate so high that it soon learns no more."""
    config = llama_tiny.pretrain_config()
    config.train.train_iters = 200
    config.dataset.sequence_length = 32
    config.dataset.num_workers = 0
    config.validation.eval_interval = 5
    config.optimizer.lr = config.optimizer.min_lr = 0.05
    return config


if __name__ == "__main__":
    pretrain(settings(), callbacks=[EarlyStopping(), WeightNorms()])
