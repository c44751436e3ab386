"""The records of a run, one per step, evaluation and sample, and the file that holds them: `metrics.jsonl`.

Defines what the numbers mean; `metrics` computes them. Imports no torch, so that a run's records are read without delay.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import click

from formats.errors import UserError, format_untrusted
from formats.json_objects import finite

FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step, or a logged interval under the step that ended it. None where a number is not known."""

    iteration: int
    loss: float | None
    """Mean over the interval's steps whose update was not skipped, each step counting the same; None if all were skipped."""

    lr: float
    """Of the last step."""

    grad_norm: float | None
    """Of the last step that had one, before clipping."""

    consumed_samples: int
    """Sequences since the start of the run, those before a resume included."""

    consumed_tokens: int
    seconds_per_step: float
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float | None
    """10^12 floating-point operations of the model per second and GPU; recomputed ones do not count. None for a model that there
    is no formula for."""

    mfu: float | None
    """`tflops_per_gpu` as a share of the GPU's dense peak, 0 to 1; None where the peak is not known."""

    epoch: float | None
    """Times that the training data was read, those before a resume included; None where it has no epochs."""

    data_wait: float
    """The share of the time, 0 to 1, that the slowest rank waited for its data."""

    memory_gib: float
    """The most ever allocated on a GPU, of the rank that has the most; on CPUs, the largest resident memory of a process."""

    memory_share: float | None
    """The same as a share of the GPU's memory, 0 to 1; None on a CPU."""

    time_left_s: float
    """Until the last step at this interval's speed, evaluations and checkpoints left out."""

    skipped_steps: int
    """Steps of the interval whose update was skipped, as after an overflow in fp16."""

    loss_scale: float | None
    device: Literal["gpu", "cpu"]
    """What `per_gpu` counts: GPUs, or processes on CPUs."""

    layer_metrics: dict[str, float] = field(default_factory=dict)
    """What layers report: means over layers with experts, and over the interval's steps.

    `load_balancing_loss`, `seq_load_balancing_loss`, `global_load_balancing_loss`: without coefficients; 1 where all experts get
    the same number of tokens. `z_loss`: without its coefficient. `max_expert_load`: tokens of a layer's busiest expert, over the
    mean of its experts. `dropped_tokens`: the share, 0 to 1, of the tokens' choices of experts that were dropped for capacity.
    `mtp_1_loss`, `mtp_2_loss`: of each layer of multi-token prediction, without `mtp_loss_scaling_factor`."""

    per_layer: dict[str, list[float]] = field(default_factory=dict)
    """Of the last step, the same of each layer, if `model.moe_per_layer_logging` is set; layers of multi-token prediction are the
    last."""

    expert_loads: list[list[float]] = field(default_factory=list)
    """Likewise, `[layers, experts]`: the tokens of each expert over the mean of its layer's, to four decimals."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out loss after a step."""

    iteration: int
    split: str
    """`validation` or `test`; of several sets `validation/NAME`."""

    loss: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text that the model generated after a step."""

    iteration: int
    prompt: str
    text: str


Record = Step | Evaluation | Sample
KINDS = {"step", "evaluation", "sample"}


def evaluation(iteration: int, *, split: str, loss: float) -> Evaluation:
    """Return the record of a mean loss per token, in nats. Perplexity is e^loss; infinite where that overflows a float."""
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    return Evaluation(iteration=iteration, split=split, loss=loss, perplexity=perplexity)


class JsonLines:
    """Write a record per line, and flush it; floats are exact, as Python's `repr` writes them.

    A float that is not finite is a string (`"NaN"`, `"Infinity"`, `"-Infinity"`), since JSON has no number for it. `kind` is
    `step`, `evaluation` or `sample`.
    """

    def __init__(self, path: Path, *, done: int = 0) -> None:
        """Drop the records of steps after `done`, the number of steps before a resume; if that is 0, rename an earlier run's
        file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not done:
            _move_aside(path)
        elif path.exists():
            _cut_back(path, done)
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: Record) -> None:
        fields = {"kind": type(record).__name__.lower(), **asdict(record)}
        self._file.write(json.dumps(finite(fields), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a `metrics.jsonl` as dictionaries, `NaN` and infinities as floats.

    A last line without its end is skipped: a run may be writing it. Raises UserError with file and line for any other line that
    is not a record.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n"):
                yield _record(line, path, number)


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or type(record.get("iteration")) is not int or record.get("kind") not in KINDS:
        text = format_untrusted(line[:60].decode("utf-8", "replace").strip())
        raise UserError(
            f"`{path}`, line {number}: `{text}` is not a record of a run",
            hint="remove the line, or choose another folder",
        )
    if record["kind"] == "sample":
        return record
    special = ("NaN", "Infinity", "-Infinity")
    return {name: float(value) if value in special else value for name, value in record.items()}


def _move_aside(path: Path) -> None:
    """Rename the file of an earlier run: `metrics-1.jsonl`, or the next number that is free."""
    if not path.stat().st_size:
        return
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    free = next(name for name in names if not name.exists())
    path.rename(free)
    click.echo(f"note: {path} was of an earlier run, and is {free.name} now", file=sys.stderr)


def _cut_back(path: Path, done: int) -> None:
    """Replace the file, atomically, by its lines of the steps until `done`."""
    old = path.read_bytes()
    kept_lines = [line for line in _whole_lines(old, path) if line[0] <= done]
    new = b"".join(line for _, line in kept_lines)
    if new == old:
        return
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as out:
        out.write(new)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)
    lines = old.count(b"\n") + (not old.endswith(b"\n")) - len(kept_lines)
    click.echo(f"note: {path}: {lines} lines of steps after {done} dropped; they are computed again", file=sys.stderr)


def _whole_lines(data: bytes, path: Path) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(io.BytesIO(data), 1):
        if line.endswith(b"\n"):
            yield _record(line, path, number)["iteration"], line
