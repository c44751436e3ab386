"""Diagnostics that only GPUs have: a snapshot of memory, megatron-core's clocks, NVIDIA's sniff test. Left out by `make test`."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize("setting", ["log_straggler", "gpu_sniff_test"])
def test_the_slowest_and_the_fastest_are_told(setting: str, ranks: Any, folder: str, tmp_path: Path) -> None:
    changes = {**PLAN, f"diagnostics__{setting}": True, "logger__log_interval": 2}
    (said,) = ranks.run(_said, 1, folder, str(tmp_path / "log"), changes)
    assert {"log_straggler": "MnRtt/Rnk", "gpu_sniff_test": "GEMM throughput"}[setting] in said
