"""The state of a run that its steps, its evaluations and callbacks share. Does nothing by itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import click

from trainer import parallel
from trainer.checkpoints.saver import Saver
from trainer.checkpoints.state_dict import Parts, Progress
from trainer.config import RunConfig
from trainer.cuda_graph import StepGraph
from trainer.data.iterators import DataWait
from trainer.logging.layer_metrics import LayerCounter
from trainer.logging.logger import RunLogger
from trainer.signals import Stop

ForwardStep = Callable[[Any, Any], Any]


class Callback:
    """Hooks called by the training loop. Every rank calls every hook.

    `run.stop.request()` on one rank or on all lets the run save and end: after this step where it is called in
    `on_evaluation`, after the next one where it is called in `on_step`, since ranks agree once in a step.
    """

    def on_start(self, run: Run) -> None:
        """Called before the first step, with weights, optimizer and data in place."""

    def on_step(self, run: Run, step: Step) -> None:
        """Called after an optimizer step."""

    def on_evaluation(self, run: Run, split: str, loss: float) -> None:
        """Called after an evaluation; `loss`, the mean per token, is the same on all ranks."""

    def on_save(self, run: Run) -> None:
        """Called after a checkpoint was begun."""

    def on_end(self, run: Run) -> None:
        """Called after the last checkpoint."""


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome of one optimizer step, the same on all ranks."""

    loss: float
    """Mean over all tokens that count."""

    grad_norm: float
    lr: float
    applied: bool
    """False where fp16 gradients overflowed and nothing changed."""

    loss_scale: float | None
    """Of fp16; None in other precisions."""

    stop: bool
    """Some rank was asked to stop, or the run's time is up."""

    save: bool
    """Some rank's clock says that a checkpoint is due."""

    waited: float = 0.0
    """Seconds that the slowest rank waited for its data."""

    work: tuple[float, float] = (0.0, 0.0)
    """Of packed rows: the tokens in examples, and the sum of the squares of the lengths of examples, over the whole batch; both 0
    where rows are not packed."""

    memory_gib: float = 0.0
    """The most that any rank has held so far: on its GPU, or resident on a CPU."""

    layer_metrics: Mapping[str, float] = MappingProxyType({})
    """What layers report: see `trainer.logging.records.Step`."""

    per_layer: Mapping[str, list[float]] = MappingProxyType({})
    expert_loads: Sequence[list[float]] = ()


@dataclass
class Run:
    """A run in progress, as one rank sees it."""

    config: RunConfig
    parts: Parts
    saver: Saver
    logger: RunLogger
    forward_step: ForwardStep
    callbacks: Sequence[Callback]
    datasets: Sequence[Any]
    """Train, validation, test; None where there is none."""

    stop: Stop
    began: float
    """On `time.monotonic`'s clock: see `trainer.clock`."""

    batches: Any = None
    waited: DataWait = field(default_factory=DataWait)

    step_graph: StepGraph | None = None
    """None where steps are computed kernel by kernel."""

    layer_counter: LayerCounter | None = None
    """None for a model without experts and without multi-token prediction."""

    prompts: Any = None
    """A tokenizer, and the prompts of which samples are generated at intervals; None where none are."""

    @property
    def progress(self) -> Progress:
        """The steps and samples so far."""
        return self.parts.progress

    @property
    def chunks(self) -> list[Any]:
        """This rank's model chunks."""
        return self.parts.chunks

    @property
    def is_complete(self) -> bool:
        """Whether all of `train.train_iters` steps are done."""
        return self.progress.iteration >= self.config.train.train_iters


def answer_signal(number: signal.Signals) -> None:
    """Print at once that the run will stop. Written past Python's buffers, which a signal may find in use."""
    if parallel.is_logging_rank():
        again = "; Ctrl-C again ends it now, and nothing is saved" if number == signal.SIGINT else ""
        os.write(2, f"\n{number.name}: stopping after this step{again}\n".encode())


def say(text: str) -> None:
    """Print a line on stderr, once for all ranks."""
    if parallel.is_logging_rank():
        click.echo(text, err=True)
