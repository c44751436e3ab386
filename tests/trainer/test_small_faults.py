"""What several ranks tell of one error, of the memory they hold, and what a resume does not print."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from formats.errors import UserError
from tests.trainer import small


class Gone(dist.Store):
    """A store whose host has ended: rank 0 took it along."""

    def add(self, key: str, amount: int) -> int:
        raise dist.DistNetworkError("the connection was closed by the remote peer")


def test_a_rank_that_comes_after_the_first_has_gone_tells_its_error() -> None:
    from trainer import parallel

    assert parallel._is_first_to_print(Gone(), UserError("a fault", hint="mend it"))


def _hold(folder: str) -> list[float]:
    """On rank 0 alone, a tensor of 256 MiB; what each rank's steps say of memory."""
    from trainer.loop import pretrain

    memory: list[float] = []

    class Watch(small.History):
        def on_start(self, run: Any) -> None:
            self.held = torch.ones(2**26) if dist.get_rank() == 0 else None

        def on_step(self, run: Any, step: Any) -> None:
            memory.append(step.memory_gib)

    pretrain(small.settings(Path(folder), train__train_iters=1, scheduler__lr_warmup_iters=0), callbacks=[Watch()])
    return memory


def test_memory_is_that_of_the_rank_that_holds_most(ranks, model_folder) -> None:
    first, second = ranks.run(_hold, 2, str(model_folder("gqa")))
    assert first == second
    (plain,) = ranks.run(_plain, 1)
    assert first[0] > plain + 0.2


def _plain() -> float:
    from trainer.logging.metrics import memory_gib

    return memory_gib(torch.device("cpu"))


def _resume(folder: str, save: str) -> list[str]:
    """What Python warns of while a run is resumed, as commands filter it."""
    from trainer import warnings_filter

    changes = {"checkpoint__save": save, "checkpoint__load": save, "scheduler__lr_warmup_iters": 0}
    small.train(folder, {**changes, "train__train_iters": 1})
    with warnings.catch_warnings(record=True) as heard:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        importlib.reload(warnings_filter)
        small.train(folder, {**changes, "train__train_iters": 2})
    return [str(warning.message) for warning in heard]


def test_a_resume_prints_no_warnings_of_libraries(ranks, model_folder, tmp_path) -> None:
    assert ranks.run(_resume, 1, str(model_folder("gqa")), str(tmp_path / "run")) == [[]]
