"""A conversion that is ready to run: its plan, and the opened source that the bytes come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from converter.comparison import CheckpointView
from converter.conversion_plan import ConversionPlan
from converter.execution import ExecutionOptions, Reporter
from formats.folder import FileRef, Folder
from formats.spec import Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A plan and its source. The target is chosen when it is executed; the caller closes `reader`."""

    plan: ConversionPlan
    reader: Reader
    """Holds the tensors that the plan's tensors are made of."""

    views: Callable[[Folder], tuple[CheckpointView, CheckpointView]]
    """Open a written output: the source and the output, as `--verify` compares them."""

    copies: Mapping[str, FileRef] = field(default_factory=dict[str, FileRef])
    """The side files to copy, by their names in the output's folder."""

    check: Callable[[], None] = lambda: None
    """Raise UserError for numbers in the source that cannot be converted. Reads tensors, which planning does not."""

    settle: Callable[[int], Conversion] | None = None
    """Return the conversion with what only reading on some threads can tell, just before it is executed: a dry run does
    without."""

    done: Callable[[], str] | None = None
    """Return a note on what only a run can tell, after it."""

    memory: int = 0
    """Bytes that reading the source holds at most, beside what is read."""


class Execution(NamedTuple):
    """A conversion with its target and the options that it is executed with."""

    conversion: Conversion
    target: str
    files: Mapping[str, int]
    """The output's, with their sizes in bytes."""

    options: ExecutionOptions
    reporter: Reporter
    sources: Sequence[Folder]
    """Which must not change meanwhile."""

    workers: int
