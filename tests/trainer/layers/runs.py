"""Models with pieces of `trainer.layers`, trained for a few steps on ranks from a checkpoint that one rank made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from tests.trainer import small

STEPS = 3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"model__tensor_model_parallel_size": 2}),
    "pp2": (2, {"model__pipeline_model_parallel_size": 2}),
    "recompute": (
        1,
        {
            "model__recompute_granularity": "full",
            "model__recompute_method": "uniform",
            "model__recompute_num_layers": 1,
        },
    ),
    "recompute attention": (1, {"model__recompute_granularity": "selective", "model__recompute_modules": ["core_attn"]}),
}
BASE = {
    "num_layers": 4, "hidden_size": 48, "num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 8, "ffn_hidden_size": 64,
    "vocab_size": 150, "seq_length": 64, "normalization": "RMSNorm", "add_bias_linear": False, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "make_vocab_size_divisible_by": 16, "init_method_std": 0.3,
}  # fmt: skip


def train(fields: dict[str, Any], changes: dict[str, Any], history: small.History | None = None) -> small.History:
    """Run on this rank a model with these fields of the provider; what it saw."""
    from trainer.config import RunConfig
    from trainer.loop import pretrain
    from trainer.model import GPTModelProvider
    from trainer.settings import values

    fields = {**BASE, **fields}
    activation = values.activation(fields.pop("activation_func", "relu"))
    config = RunConfig(model=GPTModelProvider(**fields, activation_func=activation), mixed_precision="fp32")
    config.dataset = small.FixedTokens(config.model.vocab_size)
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = STEPS, 4, 2
    config.validation.eval_iters = 0
    config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.clip_grad = 1e-4, 0.0, 1.0
    config.scheduler.lr_decay_style = "constant"
    config.dist.device = "cpu"
    for name, value in changes.items():
        section, _, setting = name.partition("__")
        setattr(getattr(config, section), setting, value)
    history = history or small.History()
    pretrain(config, callbacks=[history])
    return history


class _Scattered(small.History):
    """Moves every weight before the first step, so that none is what it was initialized to."""

    def on_start(self, run: Any) -> None:
        made = torch.Generator().manual_seed(7)
        for parameter in (parameter for chunk in run.chunks for parameter in chunk.parameters()):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=made)


def make(ranks: Any, fields: dict[str, Any], folder: Path) -> str:
    """Save random weights of such a model."""
    kept = {"train__train_iters": 1, "optimizer__lr": 0.0, "checkpoint__save": str(folder), "checkpoint__save_interval": 1}
    ranks.run(_make, 1, fields, kept)
    return str(folder)


def _make(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    train(fields, changes, _Scattered())


def without_settings(folder: str, copy: Path) -> str:
    """Copy weights without the settings of their model, for which another model is refused."""
    shutil.copytree(folder, copy)
    for file in copy.rglob("run_config.yaml"):
        file.unlink()
    return str(copy)


def start(folder: str, **changes: Any) -> dict[str, Any]:
    """Settings of a run that begins with these weights."""
    return {"checkpoint__pretrained_checkpoint": folder, **changes}
