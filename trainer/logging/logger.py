"""The log of a run: a line per interval on the console, the same numbers to services, and every step to `metrics.jsonl`.

All ranks accumulate the numbers of an interval, so that any can be checkpointed; one rank writes them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from formats.errors import UserError
from trainer import device
from trainer.config import CheckpointConfig, LoggerConfig, RunConfig
from trainer.estimate import peaks
from trainer.estimate.flops import flops_of_packed, flops_of_run
from trainer.logging import metrics, records
from trainer.logging.metrics import Interval, StepClock
from trainer.logging.writers import Writers, open_writers
from trainer.model import GPTModelProvider
from trainer.settings import yaml_io


def _in_a_terminal() -> bool:
    return sys.stderr.isatty()


@dataclass
class RunLogger:
    """Log the steps, evaluations and samples of a run. `writers` is None on ranks that write nothing."""

    measure: metrics.Measure
    writers: Writers | None
    log_interval: int
    sequence_length: int
    interval: Interval = field(default_factory=Interval)
    color: bool = field(default_factory=_in_a_terminal)
    clock: StepClock = field(default_factory=StepClock)
    _first: bool = True

    def step(self, progress: Any, step: Any) -> None:
        """Count a `trainer.state.Step`, and write its record. Print a line at the end of an interval, and after the first step of
        a program."""
        seconds = self.clock.step(step.waited)
        alone = Interval()
        for interval in (alone, self.interval):
            grad_norm = step.grad_norm if step.applied else None
            interval.add(
                step.loss, grad_norm=grad_norm, skipped=not step.applied, work=step.work, layer_metrics=step.layer_metrics
            )
        record = self._record(progress, step, alone, seconds=seconds, timed_steps=1, waited=step.waited)
        if self.writers is not None:
            self.writers.log_step(record)
        ends = progress.iteration % self.log_interval == 0 or progress.iteration >= self.measure.train_iters
        if not (ends or self._first):
            return
        device.synchronize()
        if ends:
            self._interval(progress, step)
        else:
            self._print(record)
        # The first step compiles and allocates: it counts only in a line that has no other.
        self._first = False
        self.clock.restart()

    def _interval(self, progress: Any, step: Any) -> None:
        clock, interval, self.interval = self.clock, self.interval, Interval()
        record = self._record(progress, step, interval, seconds=clock.seconds, timed_steps=clock.steps, waited=clock.waited)
        self._print(record)
        if self.writers is not None:
            self.writers.log_interval(record)

    def _record(
        self, progress: Any, step: Any, interval: Interval, *, seconds: float, timed_steps: int, waited: float
    ) -> records.Step:
        record = self.measure.step(
            interval,
            iteration=progress.iteration,
            seconds=seconds,
            timed_steps=timed_steps,
            waited=waited,
            lr=step.lr,
            consumed_samples=progress.consumed_samples,
            consumed_tokens=progress.consumed_samples * self.sequence_length,
            memory_gib=step.memory_gib,
            loss_scale=step.loss_scale,
        )
        loads = [[round(load, 4) for load in layer] for layer in step.expert_loads]
        return replace(record, per_layer=dict(step.per_layer), expert_loads=loads)

    def evaluation(self, progress: Any, split: str, loss: float) -> None:
        """Log the loss of an evaluation."""
        self._log(records.evaluation(progress.iteration, split=split, loss=loss))

    def sample(self, progress: Any, prompt: str, text: str) -> None:
        """Log a text that the model generated."""
        self._log(records.Sample(iteration=progress.iteration, prompt=prompt, text=text))

    def paused(self) -> AbstractContextManager[None]:
        """Exclude the time of an evaluation or a checkpoint from that of steps, while this is entered."""
        return self.clock.paused()

    def _log(self, record: records.Record) -> None:
        self._print(record)
        if self.writers is not None:
            self.writers.log(record)

    def _print(self, record: records.Record) -> None:
        if self.writers is not None:
            click.echo(metrics.console_line(record, self.measure.train_iters, color=self.color), err=True)

    def close(self) -> None:
        """Close files and services."""
        if self.writers is not None:
            self.writers.close()


def run_dir(logger: LoggerConfig, checkpoint: CheckpointConfig) -> Path | None:
    """Return the folder of a run's own files: `logger.run_dir`, else `checkpoint.save`."""
    folder = logger.run_dir or checkpoint.save
    return Path(folder) if folder else None


def open_logger(config: RunConfig, *, resumed_at: int, active: bool, samples_per_epoch: int | None = None) -> RunLogger:
    """Open the log of a run that goes on from step `resumed_at`; only the active rank writes it."""
    sequence = config.dataset.sequence_length
    kind = device.GPU if device.current().type == "cuda" else device.CPU
    measure = metrics.Measure(
        flops_per_token=_flops(config),
        flops_of_packed=_flops_of_packed(config),
        tokens_per_step=config.train.global_batch_size * sequence,
        num_gpus=dist.get_world_size(),
        train_iters=config.train.train_iters,
        peak_flops=_peak(config.model),
        device=kind,
        samples_per_epoch=samples_per_epoch,
        memory_of_gpu=device.memory(),
    )
    writers = None
    if active:
        folder = run_dir(config.logger, config.checkpoint)
        writers = open_writers(config.logger, folder, settings=yaml_io.as_mapping(config)[0], done=resumed_at)
    return RunLogger(measure, writers, config.logger.log_interval, sequence)


def _flops(config: RunConfig) -> float | None:
    """Return the model's FLOPs per token; None for a model that there is no formula for."""
    if not isinstance(config.model, GPTModelProvider):
        return None
    try:
        return flops_of_run(config)
    except UserError:
        return None


def _flops_of_packed(config: RunConfig) -> Callable[[float, float], float] | None:
    """Return the function for FLOPs of packed rows; None for a model that there is no formula for."""
    return None if _flops(config) is None else partial(flops_of_packed, config.model, peft=config.peft)


def _peak(model: Any) -> float | None:
    """Return the dense peak of this GPU in FLOP/s, in the model's precision; None on a CPU."""
    if device.current().type == "cpu":
        return None
    precision = "fp4" if model.fp4 else "fp8" if model.fp8 else "bf16" if model.bf16 else "fp16" if model.fp16 else "fp32"
    return peaks.peak_flops(torch.cuda.get_device_name(), precision=precision)
