"""What a conversion is asked for and what it answers: options, progress callbacks, summary.

How it is carried out is left to converter/execute.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypedDict

from converter.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Reporter:
    """Callbacks that report what a conversion does.

    `note` receives a sentence for a person, `start` the bytes of the stage that begins, `progress` bytes completed since its
    last call. `note` and `start` run on the thread that called the conversion. `progress` runs on the worker threads, on several
    at once: it must be safe for that and return quickly.

    >>> Reporter(note=print).note("weights are cast from fp32 to bf16")
    weights are cast from fp32 to bf16
    """

    note: Callable[[str], None] = lambda _text: None
    start: Callable[[int], None] = lambda _total: None
    progress: Callable[[int], None] = lambda _count: None


class ExecutionOptions(TypedDict, total=False):
    """How to carry out a conversion, as keyword arguments. The bytes of the output do not depend on it."""

    workers: int | None
    """Threads; by default as many as there are cores, 2 to 4."""

    dry_run: bool
    """Plan and check, and write nothing."""

    overwrite: bool
    """Replace an earlier output of a conversion."""

    resume: bool
    """Continue an interrupted run."""

    verify: bool
    """Read the output back and compare it with the source, before it appears at the target."""

    ranks: Ranks | None
    """Which of several processes that share the work this is; None if it is alone."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did, or with `dry_run` would do.

    Sizes are in bytes. `peak_memory` is an estimate in a dry run. `reused_bytes` are those of this process's share that an
    interrupted run had written.
    """

    command: str
    source: str
    target: str
    dry_run: bool
    tensors: int
    parameters: int
    total_bytes: int
    files: dict[str, int]
    seconds: float
    peak_memory: int
    workers: int
    layout: dict[str, int] = field(default_factory=dict[str, int])
    """Of a Megatron checkpoint: the parallel sizes it is laid out for."""

    verified: bool = False
    reused_bytes: int = 0
