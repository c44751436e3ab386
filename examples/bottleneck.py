"""Write your own PEFT method: a small network after each layer's output (Houlsby's adapters, arXiv:1902.00751).

    python examples/bottleneck.py
    torchrun --nproc-per-node 2 examples/bottleneck.py --tp 2

`trainer.peft.LoRA` and `DoRA` are built from the same classes. The rest of the model is frozen. Here it is a tiny Llama with
random weights; for a real run, set `checkpoint.pretrained_checkpoint`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import torch

from trainer import RunConfig, pretrain
from trainer.peft import PEFT, Adapter, adapt
from trainer.recipes import llama_tiny


class Bottleneck(Adapter):
    """Adds to a layer's output what two small layers compute from it."""

    def __init__(self, features: int, inner: int, like: torch.Tensor) -> None:
        super().__init__()
        self.down = torch.nn.Linear(features, inner, dtype=like.dtype, device=like.device)
        self.up = torch.nn.Linear(inner, features, dtype=like.dtype, device=like.device)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize so that nothing is added at first. `generator` is the same at every parallel layout."""
        self.down.weight.data.copy_(torch.randn(self.down.weight.shape, generator=generator) * 0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            torch.nn.init.zeros_(zero)

    def forward(self, output: torch.Tensor, layer_input: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - part of the interface
        """Return the new output; `output` is [sequence, micro batch, features]."""
        return output + self.up(torch.nn.functional.gelu(self.down(output)))


@dataclass(kw_only=True)
class Bottlenecks(PEFT):
    """A bottleneck after the last layer of attention and of the MLP, whose outputs are replicated over tensor-parallel ranks."""

    target_modules: list[str] = field(default_factory=lambda: ["linear_proj", "linear_fc2"])
    inner: int = 8

    def transform(self, module: torch.nn.Module, name: str) -> torch.nn.Module:  # noqa: ARG002 - part of the interface
        """Add a bottleneck to the layer. The fields of this class are settings: `peft.inner`."""
        return adapt(module, Bottleneck(module.weight.shape[0], self.inner, like=module.weight))


def settings(*, tp: int = 1) -> RunConfig:
    """Return a run of a tiny Llama."""
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
