"""From steps and seconds to the record of an interval, and from a record to the line that a person reads.

Knows arithmetic and words. Knows no files (`records` and `sinks` do), no clock and no ranks: the caller measures, and calls
on one rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import click
import torch

from converter.memory import peak_memory
from trainer.formatting import duration, number
from trainer.logging.records import Evaluation, Record, Sample, Step

GIB = 2**30


@dataclass(frozen=True)
class Totals:
    """What an interval came to, as plain numbers."""

    steps: int
    loss: float | None
    grad_norm: float | None
    skipped: int
    not_finite: int
    work: tuple[float, float] = (0.0, 0.0)
    """See `trainer.state.Step`."""


def of_one(step: Any) -> Totals:
    """What one step came to: a `trainer.state.Step`."""
    loss, norm = (step.loss, step.grad_norm) if step.applied else (None, None)
    return Totals(steps=1, loss=loss, grad_norm=norm, skipped=int(not step.applied), not_finite=0, work=step.work)


class Interval:
    """The steps since the last line. `add` leaves everything on its device; only `close` waits for the GPU, once."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.steps, self._skipped, self._work = 0, 0, (0.0, 0.0)
        self._loss: torch.Tensor | None = None
        self._not_finite: torch.Tensor | None = None
        self._grad_norm: torch.Tensor | float | None = None

    def add(
        self,
        loss: torch.Tensor,
        *,
        grad_norm: torch.Tensor | float | None = None,
        skipped: bool = False,
        work: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Count a step: its mean loss (a scalar tensor on any device), whether its update was skipped, the work of packed rows.

        A loss that is not finite is counted, and unless skipped it makes the mean what it is.
        """
        loss = loss.detach().double()
        wrong = (~torch.isfinite(loss)).double()
        self._not_finite = wrong if self._not_finite is None else self._not_finite + wrong
        self.steps += 1
        self._skipped += skipped
        self._work = self._work[0] + work[0], self._work[1] + work[1]
        if not skipped:
            self._loss = loss if self._loss is None else self._loss + loss
        if grad_norm is not None:
            self._grad_norm = grad_norm.detach() if isinstance(grad_norm, torch.Tensor) else grad_norm

    def close(self) -> Totals:
        """The totals since the last `close`; counting begins anew."""
        state = self.state_dict()
        self._begin()
        counted = state["steps"] - state["skipped"]
        return Totals(
            steps=state["steps"],
            loss=state["loss"] / counted if counted else None,
            grad_norm=state["grad_norm"],
            skipped=state["skipped"],
            not_finite=int(state["not_finite"]),
            work=state["work"],
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint, so that a run resumed between two lines prints the lines it would have printed.

        Waits for the GPU, as saving does.
        """
        held = (self._loss, self._not_finite, self._grad_norm)
        on_device = [value.double().reshape(()) for value in held if isinstance(value, torch.Tensor)]
        numbers = iter(torch.stack([value.to(on_device[0].device) for value in on_device]).tolist() if on_device else [])
        loss, not_finite, grad_norm = (next(numbers) if isinstance(value, torch.Tensor) else value for value in held)
        names = {"steps": self.steps, "skipped": self._skipped, "work": self._work}
        return {**names, "loss": loss, "not_finite": not_finite or 0.0, "grad_norm": grad_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.steps, self._skipped = state["steps"], state["skipped"]
        self._work = tuple(state.get("work", (0.0, 0.0)))
        self._loss = None if state["loss"] is None else torch.tensor(state["loss"], dtype=torch.float64)
        self._not_finite = torch.tensor(state["not_finite"], dtype=torch.float64)
        self._grad_norm = state["grad_norm"]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What turns a run's totals and seconds into speeds."""

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
    """Operations of packed rows, from the tokens in examples and the sum of the squares of examples' lengths."""

    def _flops(self, totals: Totals) -> float | None:
        """Operations per step."""
        tokens, squares = totals.work
        if tokens and self.flops_of_packed:
            return self.flops_of_packed(tokens, squares) / totals.steps
        return None if self.flops_per_token is None else self.tokens_per_step * self.flops_per_token

    def step(
        self,
        totals: Totals,
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
        """The record of an interval that ended with step `iteration`. Its last `timed_steps` took `seconds`, `waited` of them for
        data."""
        assert totals.steps >= timed_steps > 0, "an interval without steps"
        per_step = max(seconds, 1e-9) / timed_steps
        rate = self.tokens_per_step / per_step / self.num_gpus
        work = self._flops(totals)
        flops = None if work is None else work / per_step / self.num_gpus
        return Step(
            iteration=iteration,
            loss=totals.loss,
            lr=lr,
            grad_norm=totals.grad_norm,
            consumed_samples=consumed_samples,
            consumed_tokens=consumed_tokens,
            seconds_per_step=per_step,
            tokens_per_second_per_gpu=rate,
            tflops_per_gpu=None if flops is None else flops / 1e12,
            mfu=flops / self.peak_flops if self.peak_flops and flops is not None else None,
            epoch=consumed_samples / self.samples_per_epoch if self.samples_per_epoch else None,
            data_wait=min(waited / max(seconds, 1e-9), 1.0),
            memory_gib=memory_gib,
            memory_share=memory_gib * GIB / self.memory_of_gpu if self.memory_of_gpu else None,
            time_left_s=(self.train_iters - iteration) * per_step,
            skipped_steps=totals.skipped,
            nan_steps=totals.not_finite,
            loss_scale=loss_scale,
            device=self.device,
        )


def memory_gib(device: torch.device) -> float:
    """The most that this rank held so far: on its GPU, or resident on a CPU."""
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()) / GIB


def console_line(record: Record, total_steps: int, *, color: bool = False) -> str:
    """The record as one line whose columns stand below those of other steps."""
    width = len(str(total_steps))
    place = f"step {record.iteration:>{width}}/{total_steps}"
    shade = _colored if color else _plain
    if isinstance(record, Sample):
        return f"{shade(place, 'bright_black')}  {_short(record.prompt)} {shade(_quoted(record.text), 'green')}"
    if isinstance(record, Evaluation):
        words = f"{record.split} loss {shade(f'{record.loss:.4f}', 'cyan')}"
        return f"{shade(place, 'bright_black')}  {words}  perplexity {record.perplexity:.4g}"
    loss = "none" if record.loss is None else f"{record.loss:.4f}"
    each = "GPU" if record.device == "gpu" else "process"
    parts = [
        shade(place, "bright_black"),
        f"loss {shade(f'{loss:>7}', 'green')}",
        f"lr {record.lr:.2e}",
        *([f"grad norm {record.grad_norm:6.2f}"] if record.grad_norm is not None else []),
        f"{_significant(record.seconds_per_step):>6} s/step",
        f"{record.tokens_per_second_per_gpu:>7,.0f} tok/s/{each}",
        *([f"{_significant(record.tflops_per_gpu):>6} TFLOP/s/{each}"] if record.tflops_per_gpu is not None else []),
        *([f"MFU {shade(f'{100 * record.mfu:4.1f} %', 'magenta')}"] if record.mfu is not None else []),
        f"{record.memory_gib:5.1f} GiB" + (f" ({100 * record.memory_share:2.0f} %)" if record.memory_share else ""),
        f"data wait {100 * record.data_wait:2.0f} %",
        f"epoch {record.epoch:.2f}" if record.epoch is not None else f"{number(record.consumed_tokens):>6} tokens",
        f"left {duration(record.time_left_s)}",
    ]
    return "  ".join([*parts, *(shade(text, "red") for text in _warnings(record))])


def _quoted(text: str) -> str:
    """On one line, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)


def _short(text: str) -> str:
    """The end of a prompt, which the answer goes on from."""
    return _quoted(text if len(text) <= 60 else f"…{text[-59:]}")


def _warnings(record: Step) -> list[str]:
    found = [f"loss scale {record.loss_scale:g}"] if record.loss_scale not in (None, 1.0) else []
    found += [f"skipped {record.skipped_steps}"] if record.skipped_steps else []
    return found + ([f"loss not finite in {record.nan_steps}"] if record.nan_steps else [])


def _significant(number: float) -> str:
    """540.1 on a GPU, and 0.012 on a CPU."""
    return f"{number:.1f}" if number >= 10 else f"{number:.3f}"


def _colored(text: str, color: str) -> str:
    return click.style(text, fg=color)


def _plain(text: str, _color: str) -> str:
    return text
