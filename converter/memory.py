"""Resident memory: how much there was, and how much a conversion will take."""

from __future__ import annotations

import resource
import sys

from converter.run import PIECE_BYTES

BASE_BYTES = 64 << 20
"""The interpreter, numpy and the plan of a large model; measured (docs/decisions.md)."""


def expected_peak(workers: int) -> int:
    """Bytes a conversion holds at most: the program, and for each worker a piece, its cast, and rows being gathered."""
    return BASE_BYTES + workers * 3 * PIECE_BYTES


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Resident set of this process now, in bytes."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory()
