"""When a run began: what a time limit of a job counts from."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

_STAT = Path("/proc/self/stat")
_STARTED = 19
"""Where the time since boot at which a process started is, in clock ticks, behind its name in parentheses (proc(5), field 22)."""

_runs = itertools.count()


def run_began() -> float:
    """Return the moment on `time.monotonic`'s clock: of a process's first run that at which the process began, imports included;
    of later ones now."""
    return time.monotonic() - (0.0 if next(_runs) else process_age())


def process_age() -> float:
    """Return the seconds since this process began; 0 where the system does not say, which Linux does."""
    if not _STAT.is_file():
        return 0.0
    ticks = int(_STAT.read_text().rpartition(")")[2].split()[_STARTED])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
