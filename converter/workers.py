"""How many threads a command uses. Imports nothing that takes long: the command line's help needs the bound."""

from __future__ import annotations

from formats.errors import UserError

DEFAULT_WORKERS = 4
"""Threads mostly wait for the disk: two fill a quiet one, four also one with delays, eight gave no more."""

MOST_WORKERS = 256
"""Each has buffers of its own; more of them than that only take memory."""


def check_workers(workers: int | None) -> int:
    """The number of threads to use, `DEFAULT_WORKERS` for None. Raises UserError if it is out of bounds."""
    if workers is None:
        return DEFAULT_WORKERS
    if not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"`workers` is {workers}, which should be 1 to {MOST_WORKERS}")
    return workers
