"""Print what a command shows: progress, plans, reports and results. The work itself is done elsewhere.

What only one command needs is imported when that command runs.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.memory import peak_memory, resident_memory
from converter.ranks import from_environment, waiting
from formats.disk import free_bytes
from formats.json_objects import finite
from formats.rank_folders import FILE as RANK_FILE
from formats.urls import is_remote

if TYPE_CHECKING:
    from converter.comparison import Comparison
    from converter.execution import Reporter, Summary
    from converter.families import Family
    from converter.report import Report
    from converter.training_state import TrainingState
    from formats.integrity import Check

LINE_EVERY = 5.0
"""Seconds between progress lines if stderr is not a terminal."""


def size(count: float) -> str:
    """Format a number of bytes: 16.06 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{int(count)} B"


def count(number: int) -> str:
    """Format a number of parameters: 8.03 B."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(finite(data), allow_nan=False))


def convert(action: Callable[..., Summary], *paths: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Run a conversion with progress and print its result. Of several ranks, only rank 0 prints."""
    ranks = from_environment()
    silent = ranks.rank > 0
    if not quiet and not options["dry_run"] and (text := waiting(ranks)):
        _note(text)
    quiet, as_json = quiet or silent, as_json and not silent
    with progress_reporter(quiet=quiet or (as_json and options["dry_run"])) as reporter:
        summary = action(*paths, reporter=reporter, ranks=ranks, **options)
    if as_json:
        print_json(asdict(summary))
    elif summary.dry_run and not silent:
        show_plan(summary)
    elif not quiet:
        rate = size((summary.total_bytes - summary.reused_bytes) / max(summary.seconds, 1e-9))
        click.echo(
            f"done{', verified' if summary.verified else ''}: {summary.tensors} tensors, {count(summary.parameters)} parameters, "
            f"{size(summary.total_bytes)} in {summary.seconds:.1f} s ({rate}/s), peak memory {size(summary.peak_memory)} "
            f"-> {summary.target}{f', {size(summary.reused_bytes)} reused' if summary.reused_bytes else ''}",
            err=True,
        )


def verify(one: str, other: str, *, cast_to: str | None, workers: int | None, as_json: bool, quiet: bool) -> int:
    """Compare two checkpoints, print how they differ, and return the exit code."""
    from converter.proof import verify_checkpoints  # noqa: PLC0415

    with progress_reporter(quiet=quiet or as_json) as reporter:
        comparison = verify_checkpoints(one, other, cast_to=cast_to, workers=workers, reporter=reporter)
    if as_json:
        print_json({"same": comparison.same, **asdict(comparison), "peak_memory": peak_memory()})
    elif not quiet:
        show_comparison(comparison)
    return 0 if comparison.same else 1


def show_comparison(comparison: Comparison) -> None:
    """Print one line for each difference, then how much was compared."""
    for line in comparison.lines():
        click.echo(line)
    how = f"after a cast to {comparison.cast}" if comparison.cast else "bit for bit"
    for label, schemes in comparison.schemes.items():
        how += f"; of `{label}` the numbers that its codes and scales mean ({schemes})"
    verdict = "same" if comparison.same else "DIFFERENT"
    click.echo(f"{verdict}: {comparison.tensors} tensors, {count(comparison.parameters)} parameters compared {how}")


def check(path: str, *, as_json: bool) -> int:
    """Compare a checkpoint with its stored hashes and masters, print the result, and return the exit code."""
    from converter.proof import check_checkpoint  # noqa: PLC0415

    with progress_reporter(quiet=as_json) as reporter:
        result = check_checkpoint(path, reporter=reporter)
    if as_json:
        print_json({"whole": result.whole, **asdict(result)})
    else:
        _show_check(result)
    return 0 if result.whole else 1


def _show_check(result: Check) -> None:
    for what, names in (("changed", result.changed), ("missing", result.missing), ("not listed", result.unlisted)):
        for name in names:
            click.echo(f"{what}: {name}")
    for reason in result.without_masters:
        click.echo(f"not compared with fp32 masters: {reason}")
    if result.wrong_masters:
        first, *others = result.wrong_masters
        more = f", and {len(others)} more" if others else ""
        click.echo(f"wrong optimizer state: the fp32 master of `{first}` does not round to the weight{more}")
    compared = f", {result.masters} weights compared with fp32 masters" if result.masters else ""
    more = f"; no hashes are stored for {result.not_covered}" if result.not_covered else ""
    click.echo(f"{'intact' if result.whole else 'DAMAGED'}: {result.checked} {result.things} checked{compared}{more}")
    if result.wrong_masters:
        click.echo(
            "\nhint: the weights are intact, the optimizer state is not (megatron-core 0.15 to 0.19.2 could shift it); start "
            "from the weights: `checkpoint.pretrained_checkpoint` of mbtrain, `--finetune` of Megatron-LM",
            err=True,
        )


@contextmanager
def progress_reporter(*, quiet: bool) -> Generator[Reporter]:
    """Yield a Reporter that shows a progress bar on a terminal, and elsewhere prints a line every few seconds."""
    from converter.execution import Reporter  # noqa: PLC0415

    if quiet:
        yield Reporter()
    elif sys.stderr.isatty():
        with _bar() as (note, start, progress):
            yield Reporter(note, start, progress)
    else:
        lines = _Lines()
        yield Reporter(_note, lines.start, lines.progress)


def _note(text: str) -> None:
    click.echo(f"note: {text}", err=True)


@contextmanager
def _bar() -> Generator[tuple[Callable[[str], None], Callable[[int], None], Callable[[int], None]]]:
    """Yield the callbacks of a Reporter for a terminal."""
    from rich.console import Console  # noqa: PLC0415 - slow to import
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[memory]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None, visible=False, memory="")

        def advance(done: int) -> None:
            progress.update(task, advance=done, memory=f" {size(resident_memory())} resident")

        def start(total: int) -> None:
            progress.reset(task, total=total, visible=True, memory="")

        def note(text: str) -> None:
            progress.console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

        yield note, start, advance


class _Lines:
    """Print progress as one line every few seconds. `progress` may be called on several threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = self._done = 0
        self._started = self._printed = time.monotonic()

    def start(self, total: int) -> None:
        """Begin a stage of `total` bytes; earlier stages no longer count."""
        self._total, self._done, self._started = total, 0, time.monotonic()

    def progress(self, done: int) -> None:
        with self._lock:
            self._advance(done)

    def _advance(self, done: int) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._printed >= LINE_EVERY:
            self._printed = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate
            click.echo(
                f"{size(self._done)} of {size(self._total)}, {size(rate)}/s, {left:.0f} s left, "
                f"{size(resident_memory())} resident",
                err=True,
            )


def show_plan(summary: Summary) -> None:
    """Print every file and its size, then the memory and disk that the conversion needs."""
    for name, bytes_ in summary.files.items():
        click.echo(f"{bytes_:>16,}  {name}")
    click.echo(f"{summary.total_bytes:>16,}  bytes in {len(summary.files)} files, {count(summary.parameters)} parameters")
    if summary.layout:
        ranks = sum(name.endswith((".distcp", RANK_FILE)) for name in summary.files)
        click.echo(f"weights in {ranks} files, one for each rank that holds some: {_sizes(summary.layout)}")
    click.echo(f"expected peak memory {size(summary.peak_memory)} with {summary.workers} workers")
    if is_remote(summary.target):
        return
    free = free_bytes(Path(summary.target).parent)
    enough = "" if free is None or free >= summary.total_bytes else ": NOT ENOUGH"
    click.echo(f"free disk {'unknown' if free is None else size(free)}, needed {size(summary.total_bytes)}{enough}")


def show_report(report: Report, *, as_json: bool) -> None:
    """Print a report as lines, or as JSON."""
    if as_json:
        print_json(asdict(report))
        return
    for name, text in _report_lines(report):
        click.echo(f"{name:<12} {text}")
    for row in report.dtypes:
        click.echo(f"  {row.dtype:<10} {row.tensors:>6} tensors  {count(row.parameters):>9}  {size(row.bytes):>10}")
    for tensor in report.tensor_list:
        chunks = tensor.get("chunks")
        location = tensor.get("file") or f"{len(chunks or [])} chunks"
        click.echo(f"  {tensor['name']}  {tensor['shape']}  {tensor['dtype']}  {location}")


def _report_lines(report: Report) -> Iterator[tuple[str, str]]:
    yield "path", report.path
    yield "format", report.format + (f", {report.iteration}" if report.iteration else "")
    yield "written by", report.writer + (f", megatron-core {report.versions}" if report.versions else "")
    yield "family", f"{report.family} ({report.architecture})"
    yield "size", f"{count(report.parameters)} parameters, {report.layers} layers, {report.tensors} tensors"
    yield "files", str(report.files)
    if report.layout:
        yield "layout", f"{report.layers_as}, {_sizes(report.layout)}"
    if report.state:
        yield "optimizer", _optimizer(report, report.state)
        yield "state", _state(report.state)
    elif report.optimizer_state:
        yield "optimizer", "yes"
    if report.unknown_packages:
        yield "args", f"names classes of {', '.join(f'`{name}`' for name in report.unknown_packages)}"


def _optimizer(report: Report, state: TrainingState) -> str:
    """Describe the optimizer's state: how it is stored, and of how many weights there is some."""
    if not report.optimizer_state:
        return "no"
    if state.not_read:
        return f"yes, not read: {state.not_read}"
    numbers = f"moments of {state.moments}, fp32 masters of {state.masters}"
    if state.moments == state.masters:
        numbers = f"moments and fp32 masters of {state.masters}"
    return f"{state.optimizer}: {numbers} of {report.tensors} weights"


def _state(state: TrainingState) -> str:
    """List what a checkpoint holds beside weights and optimizer."""
    step = "" if state.iteration is None else f"step {state.iteration}"
    held = step, "scheduler" if state.scheduler else "", "random numbers" if state.random_numbers else ""
    return ", ".join(filter(None, held)) or "none"


def _sizes(layout: Mapping[str, Any]) -> str:
    """Format parallel sizes: tp 2, pp 4."""
    return ", ".join(f"{name} {value}" for name, value in layout.items())


def _family(family: Family) -> dict[str, Any]:
    """What a family is, its layouts in Megatron, the default first, whether `mbtrain` computes it, which fields of its own that
    takes, and why not if it does not."""
    return {
        "models": family.MODELS,
        "architecture": family.ARCHITECTURE,
        "layouts": list(family.LAYOUTS),
        "trains": family.trains,
        "needs": list(family.PROVIDER),
        "weights_only": family.WEIGHTS_ONLY or None,
    }


def show_families(*, every: bool = False, as_json: bool = False) -> None:
    """Print the support matrix: every file in the directory of families; with `every`, the reasons for other model types too."""
    from converter import families  # noqa: PLC0415
    from converter.unsupported_families import REASONS  # noqa: PLC0415

    supported = [(name, families.find(name)) for name in families.names()]
    unsupported = sorted(REASONS.items()) if every else []
    if as_json:
        print_json(
            {name: _family(family) for name, family in supported} | {name: {"unsupported": why} for name, why in unsupported}
        )
        return
    rows = [
        (name, family.ARCHITECTURE, "weights, trains" if family.trains else "weights", family.MODELS)
        for name, family in supported
    ]
    for line in _table(rows):
        click.echo(line)
    click.echo("\nboth ways, every TP/PP/VPP layout; dtypes kept, or cast to bf16, fp16, fp32")
    if unsupported:
        click.echo("\nnot supported:")
    for line in _table(unsupported):
        click.echo(line)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield lines whose columns are as wide as their longest word; a terminal's lines end where it does."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in rows:
        yield "  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip()[:last]
