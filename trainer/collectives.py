"""The all-reduce of each step: the loss, whether it is a number, requests to stop and to save. Changes no weight."""

from __future__ import annotations

import math
import signal
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from formats.errors import UserError
from trainer import device, parallel
from trainer.logging.metrics import memory_gib
from trainer.loss import mean_and_work
from trainer.state import Run


class StepResult(NamedTuple):
    """What all ranks know of a step once its losses are there."""

    loss: float
    stop: bool
    """Some rank was asked to stop, or the run's time is up."""

    save: bool
    """Some rank's clock says that it is time to save."""

    waited: float
    """Seconds that the slowest rank waited for data."""

    work: tuple[float, float]
    """Of packed rows: tokens in examples, and the sum of the squares of examples' lengths; both 0 where rows are not packed."""

    memory_gib: float
    """The most that a rank has held."""


def sync_step(run: Run, losses: list[torch.Tensor]) -> StepResult:
    """All ranks learn what each of them knows alone.

    Raises UserError on all of them where the loss is NaN or Inf: before it reaches the weights.
    """
    settings, bad, here = run.config, 0.0, -math.inf
    work: list[float] = []
    if losses:
        # This rank's own sum too: in the mean over all ranks, one rank's NaN is everybody's.
        ours, here, *work = torch.cat([torch.stack(losses).sum()[None], mean_and_work(losses)]).tolist()
        bad = 0.0 if math.isfinite(ours) else dist.get_rank() + 1.0
    minutes = settings.checkpoint.save_interval_in_mins
    limit = settings.train.exit_duration_in_mins
    over = run.stop.requested or (limit is not None and (time.monotonic() - run.began) / 60 >= limit)
    due = minutes is not None and run.saver.root is not None and run.saver.minutes >= minutes
    asked = float(run.stop.received or 0)
    tokens, squares = work or (0.0, 0.0)  # only the last stage knows
    held, waited = memory_gib(device.current()), run.waited.seconds
    worst, value, asked, over, due, waited, tokens, squares, held = parallel.largest(
        [bad, here if math.isfinite(here) else -math.inf, asked, float(over), float(due), waited, tokens, squares, held]
    )
    if worst:
        raise not_a_number(run, f"the loss of step {run.progress.iteration + 1} is NaN or Inf on rank {int(worst) - 1}")
    if asked:
        run.stop.received = signal.Signals(int(asked))
    return StepResult(value, bool(asked or over), bool(due), waited, (tokens, squares), held)


def not_a_number(run: Run, what: str) -> UserError:
    """The error that ends a run whose numbers are none, with the last good checkpoint."""
    run.saver.finish()  # what was begun before is good
    return UserError(
        f"{what}; {run.saver.standing}",
        hint="look at the data of this step and at `optimizer.lr`; the weights of this step were not saved",
    )
