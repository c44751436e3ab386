"""A way of your own to train few parameters: a small network behind each layer's output (Houlsby's adapters, arXiv:1902.00751).

    python examples/bottleneck.py
    torchrun --nproc-per-node 2 examples/bottleneck.py --tp 2

`trainer.peft.LoRA` and `DoRA` are made of the same parts. Everything else of the model is frozen: here a tiny Llama with random
weights, of which nothing can be learned; `checkpoint.pretrained_checkpoint` names real ones.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import torch

from trainer import RunConfig, pretrain
from trainer.peft import PEFT, Adapter, adapt
from trainer.recipes import llama_tiny


class Bottleneck(Adapter):
    """What a layer answered, and what two thin layers make of it."""

    def __init__(self, features: int, inner: int, like: torch.Tensor) -> None:
        super().__init__()
        self.down = torch.nn.Linear(features, inner, dtype=like.dtype, device=like.device)
        self.up = torch.nn.Linear(inner, features, dtype=like.dtype, device=like.device)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Nothing is added at first. The generator gives the same numbers at every layout."""
        self.down.weight.data.copy_(torch.randn(self.down.weight.shape, generator=generator) * 0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            torch.nn.init.zeros_(zero)

    def forward(self, output: torch.Tensor, layer_input: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - the seam's
        """`output` is [sequence, micro batch, features]."""
        return output + self.up(torch.nn.functional.gelu(self.down(output)))


@dataclass(kw_only=True)
class Bottlenecks(PEFT):
    """After the last layer of the attention and of the MLP, whose outputs all tensor-parallel ranks have whole."""

    target_modules: list[str] = field(default_factory=lambda: ["linear_proj", "linear_fc2"])
    inner: int = 8

    def transform(self, module: torch.nn.Module, name: str) -> torch.nn.Module:  # noqa: ARG002 - the seam's
        """The layer with a network behind it. Its fields are settings: `peft.inner`."""
        return adapt(module, Bottleneck(module.weight.shape[0], self.inner, like=module.weight))


def settings(*, tp: int = 1) -> RunConfig:
    """A tiny Llama."""
    config = llama_tiny.pretrain_config()
    config.peft = Bottlenecks()
    config.model.tensor_model_parallel_size = tp
    config.train.train_iters = 20
    config.dataset.sequence_length = 32
    config.dataset.num_workers = 0
    config.validation.eval_iters = 0
    config.optimizer.lr, config.optimizer.min_lr = 1e-2, 1e-3
    config.scheduler.lr_decay_iters = 20
    config.logger.log_interval = 1
    return config


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1)
    pretrain(settings(**vars(parser.parse_args())))
