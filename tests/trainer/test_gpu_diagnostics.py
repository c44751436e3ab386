"""Diagnostics that only GPUs have: a snapshot of memory, megatron-core's clocks, NVIDIA's sniff test. Left out by `make test`."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.trainer import small
from tests.trainer.test_gpu import BF16, SHAPE

pytestmark = pytest.mark.gpu

PLAN = {**BF16, "train__train_iters": 4, "scheduler__lr_warmup_iters": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> str:
    return str(models.save(models.build("gqa", **SHAPE), tmp_path_factory.mktemp("gpu") / "model"))


def _said(folder: str, log: str, changes: dict[str, Any]) -> str:
    """What the loggers of megatron say in a run."""
    handler = logging.FileHandler(log)
    for name in ("megatron.core.utils", "megatron.training.gpu_sniff_test"):
        logging.getLogger(name).addHandler(handler)
    small.train(folder, changes)
    return Path(log).read_text()


def test_memory_is_written_after_the_steps_that_are_asked_for(ranks: Any, folder: str, tmp_path: Path) -> None:
    asked = {"record_memory_history": True, "profile_step_start": 2, "profile_step_end": 3}
    changes = {**PLAN, **{f"profiling__{name}": value for name, value in asked.items()}, "logger__run_dir": str(tmp_path)}
    ranks.run(small.train, 1, folder, changes)
    snapshot = pickle.loads((tmp_path / "profile" / "memory-rank0.pickle").read_bytes())
    assert snapshot["segments"]


class Greedy(small.History):
    """A callback that wants more memory than any GPU has, after one of the steps."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.kept = step, torch.empty(0)

    def on_step(self, run: Any, step: Any) -> None:
        super().on_step(run, step)
        if run.progress.iteration == self.step:
            self.kept = torch.empty(2**24, dtype=torch.uint8, device="cuda")  # the last allocation that succeeds
            torch.empty(2**44, dtype=torch.uint8, device="cuda")


def _fill(folder: str, changes: dict[str, Any], step: int) -> tuple[str, int]:
    """The class of the error that ends a run, and the number of its steps."""
    from trainer.loop import pretrain

    greedy = Greedy(step)
    try:
        pretrain(small.settings(Path(folder), **changes), callbacks=[greedy])
    except torch.OutOfMemoryError as error:
        return type(error).__name__, len(greedy.losses)
    return "", len(greedy.losses)


@pytest.mark.parametrize("step", [1, 4])
def test_memory_is_written_when_it_is_full_also_outside_the_steps_that_are_recorded(
    step: int, ranks: Any, folder: str, tmp_path: Path
) -> None:
    asked = {"record_memory_history": True, "profile_step_start": 2, "profile_step_end": 3}
    changes = {**PLAN, **{f"profiling__{name}": value for name, value in asked.items()}, "logger__run_dir": str(tmp_path)}
    assert ranks.run(_fill, 1, folder, changes, step) == [("OutOfMemoryError", step)]
    written = {path.name: path for path in (tmp_path / "profile").iterdir()}
    assert set(written) == {"out-of-memory-rank0.pickle", *(["memory-rank0.pickle"] if step > 3 else [])}
    snapshot = pickle.loads(written["out-of-memory-rank0.pickle"].read_bytes())
    events = max(snapshot["device_traces"], key=len)  # of this process's GPU
    assert [event["size"] for event in events if event["action"] == "alloc"][-1] == 2**24
    assert [event["size"] for event in events if event["action"] == "oom"] == [2**44]


@pytest.mark.parametrize("setting", ["log_straggler", "gpu_sniff_test"])
def test_the_slowest_and_the_fastest_are_told(setting: str, ranks: Any, folder: str, tmp_path: Path) -> None:
    changes = {**PLAN, f"diagnostics__{setting}": True, "logger__log_interval": 2}
    (output,) = ranks.run(_said, 1, folder, str(tmp_path / "log"), changes)
    assert {"log_straggler": "MnRtt/Rnk", "gpu_sniff_test": "GEMM throughput"}[setting] in output
