"""Resident memory: how much there was, and how much a conversion will take."""

from __future__ import annotations

import sys
from pathlib import Path

from converter.run import PIECE_BYTES

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None

BASE_BYTES = 48 << 20
"""The interpreter, numpy and the plan of a large model: planning 405B peaks at 51 MiB."""


def expected_peak(workers: int) -> int:
    """Bytes a conversion holds at most: the program, and for each worker a piece and what is cast or gathered for it."""
    return BASE_BYTES + workers * 2 * PIECE_BYTES


def peak_memory() -> int:
    """Largest resident set of this program so far, in bytes; 0 where the system does not tell.

    `VmHWM` starts anew with the program; `getrusage` would also count the shell or launcher it was forked from.
    """
    if (known := _status("VmHWM")) or not resource:
        return known
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Resident set of this program now, in bytes."""
    return _status("VmRSS") or peak_memory()


def _status(field: str) -> int:
    """A size from Linux's `/proc`, in bytes; 0 on systems that have none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = next((line for line in lines if line.startswith(f"{field}:")), f"{field}: 0")
    return int(found.split()[1]) * 1024
