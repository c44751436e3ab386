"""The time at which a run began, which a job's time limit counts from."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

_STAT = Path("/proc/self/stat")
_STARTED = 19
"""The field with a process's start, in clock ticks since boot, counted from after its name in parentheses (proc(5), field 22)."""

_runs = itertools.count()


def run_began() -> float:
    """Return the time at which the run began, on `time.monotonic`'s clock: the start of the process, imports included, for its
    first run; now for later ones."""
    return time.monotonic() - (0.0 if next(_runs) else process_age())


def process_age() -> float:
    """Return the seconds since this process began; 0 on systems other than Linux."""
    if not _STAT.is_file():
        return 0.0
    ticks = int(_STAT.read_text().rpartition(")")[2].split()[_STARTED])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
