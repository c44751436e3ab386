"""From steps to the record of an interval: sums, times and speeds; and from a record to the console line.

Leaves files and services to `records` and `writers`, and ranks to `logger`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import click
import torch

from converter.memory import peak_memory
from trainer.formatting import duration, number
from trainer.logging.records import Evaluation, Record, Sample, Step

GIB = 2**30


@dataclass
class Interval:
    """Sums over the steps since the last logged line; a checkpoint holds them, so that a resumed run logs the same lines."""

    steps: int = 0
    skipped: int = 0
    """Steps whose update was skipped: fp16 gradients overflowed."""

    loss_sum: float = 0.0
    """Of the steps that were not skipped."""

    grad_norm: float | None = None
    """Of the last step that had one."""

    work: tuple[float, float] = (0.0, 0.0)
    """Of packed rows: see `trainer.state.Step`."""

    layer_sums: dict[str, float] = field(default_factory=dict)
    """Of all steps: see `trainer.logging.records.Step.layer_metrics`."""

    def add(
        self,
        loss: float,
        *,
        grad_norm: float | None = None,
        skipped: bool = False,
        work: tuple[float, float] = (0.0, 0.0),
        layer_metrics: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Count a step."""
        self.steps += 1
        self.layer_sums = {name: self.layer_sums.get(name, 0.0) + value for name, value in layer_metrics.items()}
        self.skipped += skipped
        self.work = self.work[0] + work[0], self.work[1] + work[1]
        if not skipped:
            self.loss_sum += loss
        if grad_norm is not None:
            self.grad_norm = grad_norm

    @property
    def loss(self) -> float | None:
        """The mean over steps that were not skipped, each counting the same; None if all were."""
        counted = self.steps - self.skipped
        return self.loss_sum / counted if counted else None

    @property
    def layer_metrics(self) -> dict[str, float]:
        """The means over all steps."""
        return {name: total / self.steps for name, total in self.layer_sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers for a checkpoint, under the names of earlier versions, which also counted losses that are NaN."""
        names = {"steps": self.steps, "skipped": self.skipped, "work": self.work, "not_finite": 0.0}
        names |= {"layer_sums": self.layer_sums} if self.layer_sums else {}
        return {**names, "loss": self.loss_sum if self.steps > self.skipped else None, "grad_norm": self.grad_norm}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Interval:
        """Return the interval of which `state_dict` returned `state`; earlier versions had no `work`, and models without experts
        have no `layer_sums`."""
        return cls(
            state["steps"],
            state["skipped"],
            state["loss"] or 0.0,
            state["grad_norm"],
            tuple(state.get("work", (0.0, 0.0))),
            state.get("layer_sums", {}),
        )


class StepClock:
    """Times steps, evaluations and checkpoints excluded.

    The interval's time starts anew with each logged line, with the first step after a resume, and after the first step of a
    program, which compiles and allocates.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start an interval: the next step begins now."""
        self._began = self._step_began = time.perf_counter()
        self.steps, self.waited = 0, 0.0

    def step(self, waited: float) -> float:
        """Return the seconds that the step which ends now took; `waited` of them were for data."""
        now = time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        self.steps += 1
        self.waited += waited
        return seconds

    @property
    def seconds(self) -> float:
        """Since the interval began."""
        return time.perf_counter() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside this context."""
        began = time.perf_counter()
        try:
            yield
        finally:
            paused = time.perf_counter() - began
            self._began += paused
            self._step_began += paused


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Constants of a run, which turn sums and seconds into speeds."""

    flops_per_token: float | None
    """Floating-point operations of forward and backward, per token, of the whole model; None where there is no formula."""

    tokens_per_step: int
    num_gpus: int
    """All ranks of the run; on CPUs, processes."""

    train_iters: int
    peak_flops: float | None = None
    """FLOP/s of one GPU: `peaks.peak_flops`."""

    device: Literal["gpu", "cpu"] = "gpu"
    samples_per_epoch: int | None = None
    memory_of_gpu: int | None = None
    """Bytes; None on a CPU."""

    flops_of_packed: Callable[[float, float], float] | None = None
    """Operations of packed rows, from the tokens in examples and the sum of the squares of the lengths of examples."""

    def _flops(self, interval: Interval, seconds_per_step: float) -> float | None:
        """Return the FLOP/s of one GPU; None where there is no formula."""
        tokens, squares = interval.work
        if tokens and self.flops_of_packed:
            operations = self.flops_of_packed(tokens, squares) / interval.steps
        elif self.flops_per_token is None:
            return None
        else:
            operations = self.tokens_per_step * self.flops_per_token
        return operations / seconds_per_step / self.num_gpus

    def step(
        self,
        interval: Interval,
        *,
        iteration: int,
        seconds: float,
        timed_steps: int,
        lr: float,
        consumed_samples: int,
        consumed_tokens: int,
        memory_gib: float,
        waited: float = 0.0,
        loss_scale: float | None = None,
    ) -> Step:
        """Return the record of an interval up to step `iteration`, whose last `timed_steps` took `seconds`, `waited` for data."""
        assert interval.steps >= timed_steps > 0, "an interval without steps"
        per_step = max(seconds, 1e-9) / timed_steps
        flops = self._flops(interval, per_step)
        return Step(
            iteration=iteration,
            loss=interval.loss,
            lr=lr,
            grad_norm=interval.grad_norm,
            consumed_samples=consumed_samples,
            consumed_tokens=consumed_tokens,
            seconds_per_step=per_step,
            tokens_per_second_per_gpu=self.tokens_per_step / per_step / self.num_gpus,
            tflops_per_gpu=None if flops is None else flops / 1e12,
            mfu=flops / self.peak_flops if self.peak_flops and flops is not None else None,
            epoch=consumed_samples / self.samples_per_epoch if self.samples_per_epoch else None,
            data_wait=min(waited / max(seconds, 1e-9), 1.0),
            memory_gib=memory_gib,
            memory_share=memory_gib * GIB / self.memory_of_gpu if self.memory_of_gpu else None,
            time_left_s=(self.train_iters - iteration) * per_step,
            skipped_steps=interval.skipped,
            loss_scale=loss_scale,
            device=self.device,
            layer_metrics=interval.layer_metrics,
        )


def memory_gib(device: torch.device) -> float:
    """Return the most memory, in GiB, that this rank has held: allocated on its GPU, or resident on a CPU."""
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()) / GIB


def console_line(record: Record, total_steps: int, *, color: bool = False) -> str:
    """Return the record as one line. Columns are aligned with those of other steps."""
    width = len(str(total_steps))
    position = f"step {record.iteration:>{width}}/{total_steps}"
    shade = _colored if color else _plain
    if isinstance(record, Sample):
        return f"{shade(position, 'bright_black')}  {_short(record.prompt)} {shade(_quoted(record.text), 'green')}"
    if isinstance(record, Evaluation):
        words = f"{record.split} loss {shade(f'{record.loss:.4f}', 'cyan')}"
        return f"{shade(position, 'bright_black')}  {words}  perplexity {record.perplexity:.4g}"
    loss = "none" if record.loss is None else f"{record.loss:.4f}"
    unit = "GPU" if record.device == "gpu" else "process"
    parts = [
        shade(position, "bright_black"),
        f"loss {shade(f'{loss:>7}', 'green')}",
        f"lr {record.lr:.2e}",
        *([f"grad norm {record.grad_norm:6.2f}"] if record.grad_norm is not None else []),
        *_of_layers(record.layer_metrics),
        f"{_significant(record.seconds_per_step):>6} s/step",
        f"{record.tokens_per_second_per_gpu:>7,.0f} tok/s/{unit}",
        *([f"{_significant(record.tflops_per_gpu):>6} TFLOP/s/{unit}"] if record.tflops_per_gpu is not None else []),
        *([f"MFU {shade(f'{100 * record.mfu:4.1f} %', 'magenta')}"] if record.mfu is not None else []),
        f"{record.memory_gib:5.1f} GiB" + (f" ({100 * record.memory_share:2.0f} %)" if record.memory_share else ""),
        f"data wait {100 * record.data_wait:2.0f} %",
        f"epoch {record.epoch:.2f}" if record.epoch is not None else f"{number(record.consumed_tokens):>6} tokens",
        f"left {duration(record.time_left_s)}",
    ]
    return "  ".join([*parts, *(shade(text, "red") for text in _warnings(record))])


def _of_layers(values: Mapping[str, float]) -> Iterator[str]:
    """Yield what layers report, as `balance 1.02  z 4.310  busiest 1.41×  dropped 0.3 %  mtp 5.21`."""
    for name, value in values.items():
        if name.endswith("load_balancing_loss"):
            yield f"{name.removesuffix('load_balancing_loss').replace('_', ' ')}balance {value:.3f}"
        elif name.startswith("mtp_"):
            yield f"{name.removesuffix('_loss').replace('_', ' ')} {value:.4f}"
    if "z_loss" in values:
        yield f"z {values['z_loss']:.3f}"
    if "max_expert_load" in values:
        yield f"busiest expert {values['max_expert_load']:.2f}×"
    if "dropped_tokens" in values:
        yield f"dropped {100 * values['dropped_tokens']:.1f} %"


def _quoted(text: str) -> str:
    """Return the text as a JSON string, which is one line."""
    return json.dumps(text, ensure_ascii=False)


def _short(text: str) -> str:
    """Return the last 60 characters of a prompt, quoted."""
    return _quoted(text if len(text) <= 60 else f"…{text[-59:]}")


def _warnings(record: Step) -> list[str]:
    scale = [f"loss scale {record.loss_scale:g}"] if record.loss_scale not in (None, 1.0) else []
    return scale + ([f"skipped {record.skipped_steps}"] if record.skipped_steps else [])


def _significant(number: float) -> str:
    """Format with one decimal, or three below 10: 540.1 on a GPU, 0.012 on a CPU."""
    return f"{number:.1f}" if number >= 10 else f"{number:.3f}"


def _colored(text: str, color: str) -> str:
    return click.style(text, fg=color)


def _plain(text: str, _color: str) -> str:
    return text
