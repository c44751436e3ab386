"""Memory of this process: how much is resident, now and at most so far, and how often cycles are looked for. Imports nothing that
takes long."""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None


@contextmanager
def seldom_collected() -> Generator[None]:
    """Look for reference cycles a hundred times less often. Plans are hundreds of thousands of objects that live to the end:
    looking through them again and again took a fifth of planning."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


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
