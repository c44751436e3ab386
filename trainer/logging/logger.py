"""The log of a run: a line per interval on the console, the same numbers to services, and every step to `metrics.jsonl`.

All ranks accumulate the numbers of an interval, so that any can be checkpointed; one rank writes them.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from formats.errors import UserError
from trainer import device, parallel
from trainer.config import RunConfig
from trainer.estimate import peaks
from trainer.estimate.flops import flops_of_packed, flops_of_run
from trainer.logging import metrics, records
from trainer.logging.writers import Writers, open_writers
from trainer.model import GPTModelProvider
from trainer.settings import yaml_io


def _in_a_terminal() -> bool:
    return sys.stderr.isatty()


@dataclass
class RunLogger:
    """A run's voice. `sinks` is None on ranks that are silent."""

    config: RunConfig
    measure: metrics.Measure
    sinks: Writers | None
    interval: metrics.Interval = field(default_factory=metrics.Interval)
    color: bool = field(default_factory=_in_a_terminal)
    _since: float = field(default_factory=time.perf_counter)
    _step_since: float = field(default_factory=time.perf_counter)
    _waited: float = 0.0
    _timed: int = 0
    """Steps since `_since`: fewer than the interval's where it began before a resume, or with the first step."""

    _first: bool = True

    def start_clock(self) -> None:
        """Measure from here on: the first step follows."""
        self._since = self._step_since = time.perf_counter()
        self._timed, self._waited = 0, 0.0

    def step(self, progress: Any, step: Any) -> None:
        """Count a step and write its record; at an interval's end, and after the first step of a program, a line too."""
        now = time.perf_counter()
        seconds = now - self._step_since
        one = self._record(progress, step, metrics.of_one(step), seconds=seconds, timed_steps=1, waited=step.waited)
        self._step_since, self._waited = now, self._waited + step.waited
        if self.sinks is not None:
            self.sinks.log_step(one)
        grad_norm = step.grad_norm if step.applied else None
        self.interval.add(torch.tensor(step.loss), grad_norm=grad_norm, skipped=not step.applied, work=step.work)
        self._timed += 1
        ends = progress.iteration % self.config.logger.log_interval == 0 or progress.iteration >= self.config.train.train_iters
        if not (ends or self._first):
            return
        device.synchronize()
        if ends:
            self._interval(progress, step)
        else:
            self._print(one)
        # The first step compiles and allocates: it counts only in a line that has no other.
        self._first = False
        self.start_clock()

    def _interval(self, progress: Any, step: Any) -> None:
        seconds, totals = time.perf_counter() - self._since, self.interval.close()
        record = self._record(progress, step, totals, seconds=seconds, timed_steps=self._timed, waited=self._waited)
        self._print(record)
        if self.sinks is not None:
            self.sinks.log_interval(record)

    def _record(
        self, progress: Any, step: Any, totals: metrics.Totals, *, seconds: float, timed_steps: int, waited: float
    ) -> records.Step:
        return self.measure.step(
            totals,
            iteration=progress.iteration,
            seconds=seconds,
            timed_steps=timed_steps,
            waited=waited,
            lr=step.lr,
            consumed_samples=progress.consumed_samples,
            consumed_tokens=progress.consumed_samples * self.config.dataset.sequence_length,
            memory_gib=step.memory_gib,
            loss_scale=step.loss_scale,
        )

    def evaluation(self, progress: Any, split: Any, loss: float) -> None:
        """Tell an evaluation."""
        self._tell(records.evaluation(progress.iteration, split=split, loss=loss))

    def sample(self, progress: Any, prompt: str, text: str) -> None:
        """Tell what the model answered."""
        self._tell(records.Sample(iteration=progress.iteration, prompt=prompt, text=text))

    def pause(self, seconds: float) -> None:
        """Exclude the time of an evaluation or a checkpoint from that of steps."""
        self._since += seconds
        self._step_since += seconds

    def _tell(self, record: records.Record) -> None:
        self._print(record)
        if self.sinks is not None:
            self.sinks.log(record)

    def _print(self, record: records.Record) -> None:
        if self.sinks is not None:
            click.echo(metrics.console_line(record, self.config.train.train_iters, color=self.color), err=True)

    def close(self) -> None:
        """Let go of files and services."""
        if self.sinks is not None:
            self.sinks.close()


def run_dir(config: RunConfig) -> Path | None:
    """Where a run's own files go."""
    folder = config.logger.run_dir or config.checkpoint.save
    return Path(folder) if folder else None


def make_folders(config: RunConfig) -> None:
    """The folders that a run writes to, made on rank 0. UserError on all ranks where one cannot be written, before the work."""
    logger = config.logger
    for setting, folder in (
        ("checkpoint.save", config.checkpoint.save),
        ("logger.run_dir", logger.run_dir),
        ("logger.tensorboard_dir", logger.tensorboard_dir),
        ("logger.wandb_save_dir", logger.wandb_save_dir),
    ):
        try:
            parallel.on_first_rank(partial(_make, folder))
        except OSError as error:
            raise UserError(
                f"`{setting}` is `{folder}`, which cannot be written to: {error.strerror}",
                hint="give a folder that can be made or written to",
            ) from error


def _make(folder: str | None) -> None:
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)


def open_logger(config: RunConfig, *, resumed_at: int, active: bool, samples_per_epoch: int | None = None) -> RunLogger:
    """The log of a run that goes on from step `resumed_at`; only the active rank writes it."""
    sequence = config.dataset.sequence_length
    kind = device.GPU if device.current().type == "cuda" else device.CPU
    measure = metrics.Measure(
        flops_per_token=_flops(config),
        flops_of_packed=_flops_of_packed(config),
        tokens_per_step=config.train.global_batch_size * sequence,
        num_gpus=dist.get_world_size(),
        train_iters=config.train.train_iters,
        peak_flops=_peak(config),
        device=kind,
        samples_per_epoch=samples_per_epoch,
        memory_of_gpu=device.memory(),
    )
    settings = yaml_io.as_mapping(config)[0]
    sinks = open_writers(config.logger, run_dir(config), settings=settings, done=resumed_at) if active else None
    return RunLogger(config, measure, sinks)


def _flops(config: RunConfig) -> float | None:
    """Model FLOPs per token; None for a model that there is no formula for."""
    if not isinstance(config.model, GPTModelProvider):
        return None
    try:
        return flops_of_run(config)
    except UserError:
        return None


def _flops_of_packed(config: RunConfig) -> Callable[[float, float], float] | None:
    """None for a model that there is no formula for."""
    return None if _flops(config) is None else partial(flops_of_packed, config.model, peft=config.peft)


def _peak(config: RunConfig) -> float | None:
    """The dense peak of this GPU; None on a CPU."""
    if device.current().type == "cpu":
        return None
    model = config.model
    computed = "fp4" if model.fp4 else "fp8" if model.fp8 else "bf16" if model.bf16 else "fp16" if model.fp16 else "fp32"
    return peaks.peak_flops(torch.cuda.get_device_name(), precision=computed)
