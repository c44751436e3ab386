"""Choose how many threads a command uses. Imports nothing slow: the command line's help needs the bound."""

from __future__ import annotations

import os

from formats.errors import UserError

FEWEST, DEFAULT = 2, 4
"""Threads mostly wait for the disk: two saturate a quiet one, four also one with delays, eight gave no more. More threads
than cores compete for the interpreter lock: four on two cores took up to 1.4 times the core-seconds of two."""

MOST_WORKERS = 256
"""Each has buffers of its own; more threads would only take memory."""


def check_workers(workers: int | None) -> None:
    """Raise UserError if the number of threads is out of bounds."""
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"`workers` is {workers}, which should be 1 to {MOST_WORKERS}")


def count_workers(workers: int | None, *, remote: bool) -> int:
    """Return the number of threads to use: `workers` if given, else one per core, `FEWEST` to `DEFAULT`.

    With a `remote` source or target it is `DEFAULT`, as threads then wait for the network. Raises UserError if `workers` is
    out of bounds.

    >>> count_workers(7, remote=False)
    7
    """
    check_workers(workers)
    if workers is None:
        return DEFAULT if remote else max(FEWEST, min(DEFAULT, _cores()))
    return workers


def _cores() -> int:
    """Return the cores that this process may use: a batch job's may be fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
