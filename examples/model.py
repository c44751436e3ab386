"""Train your own model: a GRU without Megatron layers, which trains, saves and resumes.

    python examples/model.py                                       # 20 steps
    python examples/model.py --save /tmp/gru                       # 20 steps and a checkpoint
    python examples/model.py --save /tmp/gru --steps 40            # resumes it: 20 more
    torchrun --nproc-per-node 2 examples/model.py                  # data parallel

`config.model` is a provider, which builds the module; trainer/model.py specifies both.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from trainer import ModelProvider, RunConfig, pretrain
from trainer.config import DatasetConfig


@dataclass(kw_only=True)
class GruProvider(ModelProvider):
    """Builds the GRU. Its fields are settings, which are logged and saved with the run."""

    width: int = 64
    depth: int = 2

    def provide(self, pre_process: bool, post_process: bool, vp_stage: int | None = None) -> torch.nn.Module:  # noqa: ARG002
        """Return the whole model: without pipeline parallelism, each rank has the first and the last stage."""
        return Gru(self.vocab_size, width=self.width, depth=self.depth)


class Gru(torch.nn.Module):
    """A language model of torch's layers."""

    def __init__(self, vocab_size: int, *, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, width)
        self.recurrent = torch.nn.GRU(width, width, num_layers=depth, batch_first=True)
        self.output = torch.nn.Linear(width, vocab_size)

    def forward(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor,  # noqa: ARG002 - a GRU needs no positions
        attention_mask: torch.Tensor | None,  # noqa: ARG002
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of each token [micro batch, sequence]; without labels, the logits [micro batch, sequence,
        vocabulary]."""
        hidden, _ = self.recurrent(self.embedding(tokens))
        logits = self.output(hidden)
        if labels is None:
            return logits
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")


def settings(*, steps: int = 20, save: str | None = None) -> RunConfig:
    """Return a run without a recipe: every setting that has no default is set here."""
    config = RunConfig(model=GruProvider(vocab_size=256), mixed_precision="fp32")
    config.dataset = DatasetConfig(sequence_length=32, num_workers=0)
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = steps, 8, 4
    config.optimizer.lr = 1e-2
    config.scheduler.lr_decay_style = "constant"
    config.validation.eval_iters = 1
    config.checkpoint.save = config.checkpoint.load = save
    return config


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save")
    arguments = parser.parse_args()
    pretrain(settings(steps=arguments.steps, save=arguments.save))
