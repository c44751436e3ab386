"""Resident memory of this process: now, and at most so far. Imports nothing that takes long."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None


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
