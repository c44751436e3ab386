"""What looks into runs: torch's profiler, the comparison of weights, the two timeouts, the error that torchrun is told of."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.errors import UserError
from tests.trainer import small
from tests.trainer.settings import settings
from trainer.commands.pretrain import run_training
from trainer.settings.resolve import resolve

PLAN = {"train__train_iters": 4, "scheduler__lr_warmup_iters": 1}


def test_torchs_profiler_records_the_steps_that_are_asked_for(ranks: Any, model_folder: Any, tmp_path: Path) -> None:
    asked = {"use_pytorch_profiler": True, "profile_step_start": 2, "profile_step_end": 3}
    changes = {**PLAN, **{f"profiling__{name}": value for name, value in asked.items()}, "logger__run_dir": str(tmp_path)}
    ranks.run(small.train, 2, str(model_folder()), changes)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps-2-3-rank0.json"
    steps = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "Optimizer.step#AdamW.step"]
    assert len(steps) == 2


class Broken(small.History):
    """A rank whose memory loses a bit."""

    def on_step(self, run: Any, step: Any) -> None:
        if torch.distributed.get_rank() == 1 and run.progress.iteration == 1:
            with torch.no_grad():
                next(run.chunks[0].parameters()).view(-1)[0] += 1


@dataclass
class Waiting(small.History):
    """A rank that does not go on after the second step, until a rank gave up on it and has left the file `ended`."""

    ended: Path = Path()

    def on_step(self, run: Any, step: Any) -> None:
        if torch.distributed.get_rank() == 1 and run.progress.iteration == 2:
            limit = time.monotonic() + 120
            while not self.ended.exists() and time.monotonic() < limit:
                time.sleep(0.05)


def _fails(folder: str, changes: dict[str, Any], callback: small.History) -> str:
    """The error of this rank; nothing where it has none."""
    from trainer.loop import pretrain

    try:
        pretrain(small.settings(Path(folder), **changes), callbacks=[callback])
    except UserError as error:
        return str(error)
    except RuntimeError as error:
        return type(error).__name__
    return ""


def test_weights_that_ranks_do_not_share_are_told_on_all_of_them(ranks: Any, model_folder: Any) -> None:
    changes = {**PLAN, "diagnostics__check_weight_hash_across_dp_replicas_interval": 2, "ddp__use_distributed_optimizer": False}
    messages = ranks.run(_fails, 2, str(model_folder()), changes, Broken())
    assert messages[0] == messages[1]
    assert messages[0].startswith("after step 2, the weights of rank 1 are not those of the other data-parallel ranks; ")
    assert ranks.run(_fails, 2, str(model_folder()), changes, small.History()) == ["", ""]


def _gives_up(folder: str, changes: dict[str, Any], callback: Waiting) -> str:
    """The error of this rank; rank 0 leaves the file that rank 1 waits for."""
    try:
        return _fails(folder, changes, callback)
    finally:
        if os.environ["RANK"] == "0":
            callback.ended.touch()


def test_steps_have_a_timeout_of_their_own(ranks: Any, model_folder: Any, tmp_path: Path) -> None:
    """Rank 0 gives up on rank 1, which waits two minutes for that: long before the ten minutes that starting may take."""
    changes = {**PLAN, "dist__step_timeout_minutes": 0.03}
    messages = ranks.run(_gives_up, 2, str(model_folder()), changes, Waiting(ended=tmp_path / "ended"))
    assert "Error" in messages[0]


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("profiling.record_memory_history", "it is the memory of GPUs"),
        ("diagnostics.gpu_sniff_test", "it measures GPUs"),
        ("diagnostics.log_straggler", "its clocks are CUDA's events"),
    ],
)
def test_what_needs_gpus_is_refused_on_the_cpu(setting: str, why: str) -> None:
    with pytest.raises(UserError) as refused:
        resolve(settings(**{setting.replace(".", "__"): True}), world_size=1, device="cpu")
    assert str(refused.value).startswith(f"`{setting}` is `True`, which does not work on the CPU: {why}\n")


def test_steps_to_profile_are_in_order() -> None:
    with pytest.raises(UserError, match=r"`profiling.profile_step_end` is `3`; it must be at least `5`"):
        resolve(settings(profiling__profile_step_start=5, profiling__profile_step_end=3), world_size=1, device="cpu")


def test_torchrun_is_told_why_a_rank_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(UserError):
        run_training(["llama_tiny", "optimizer.lr=-1", "dist.device=cpu"], None, None, finetune=False)
    assert "`optimizer.lr` is `-1.0`" in (tmp_path / "error.json").read_text()
