"""All that a run is when it ends, rank by rank: what must be the same to the last bit after a resume."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.trainer import small

TIMES = {
    "seconds_per_step", "tokens_per_second_per_gpu", "tflops_per_gpu", "memory_gib", "memory_share", "data_wait", "time_left_s",
}  # fmt: skip
"""What the metrics say of the clock and the process, not of the training."""


@dataclass
class Witness(small.History):
    """A history, and what is left at the end: weights, optimizer state and random states, by name."""

    left: dict[str, Any] = field(default_factory=dict)
    seen: list[list[int]] = field(default_factory=list)
    """The tokens of each sample, in the order they came."""

    def forward_step(self, batches: Any, model: Any) -> Any:
        """The trainer's own, which it is told of."""
        from trainer.loss import forward_step

        batch = next(batches) if batches is not None else None
        self.seen += batch["tokens"].tolist() if batch and model.training else []
        return forward_step(iter([batch]) if batch else None, model)

    def on_end(self, run: Any) -> None:
        super().on_end(run)
        self.left = {**self.weights, **dict(_optimizer(run)), **_random(), "samples": run.progress.consumed_samples}


def _optimizer(run: Any) -> Iterator[tuple[str, Any]]:
    outer = run.parts.optimizer
    for number, optimizer in enumerate(getattr(outer, "chained_optimizers", [outer])):
        inner = optimizer.optimizer
        for group, param_group in enumerate(inner.param_groups):
            yield (
                f"optimizer {number}.{group}",
                {name: param_group.get(name) for name in ("lr", "weight_decay", "betas", "momentum")},
            )
            for position, parameter in enumerate(param_group["params"]):
                for name, value in inner.state[parameter].items():
                    yield f"optimizer {number}.{group}.{position}.{name}", value


def _random() -> dict[str, Any]:
    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    trackers = tensor_parallel.get_cuda_rng_tracker().get_states()
    drawn = {"python": random.getstate(), "numpy": np.random.get_state()[1].tolist(), "torch": torch.get_rng_state()}
    return {**drawn, **{f"tracker {name}": value for name, value in trackers.items()}}


def train(folder: str, changes: dict[str, Any]) -> Witness:
    """Run on this rank."""
    import numpy as np

    from trainer.loop import pretrain

    random.seed(len(str(changes)))  # whatever these were before
    np.random.seed(len(str(changes)))
    witness = Witness()
    pretrain(small.settings(Path(folder), **changes), witness.forward_step, callbacks=[witness])
    return witness


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names under which two states are not the same bits."""
    import torch

    def same(left: Any, right: Any) -> bool:
        return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right

    assert first.keys() == second.keys()
    return [name for name in first if not same(first[name], second[name])]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, but for what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
