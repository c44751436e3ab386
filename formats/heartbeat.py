"""Detect dead processes: each process rewrites a file again and again, and others watch that file change.

Clocks of different hosts are never compared, and file times are not trusted: an observer measures on its own clock how long
the content has stayed the same. What the files are for is left to the callers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

PATIENCE = 60.0
"""Seconds without a change after which a process on another host counts as dead."""

_BEATS = 30  # heartbeats within `patience`; on NFS a write also refreshes what this host sees of the directory
_LOOKS = 10  # unchanged reads that it takes at least to call a process dead


class Heartbeat:
    """Call `beat` on a thread of its own, from the start of a `with` block to its end.

    Exceptions of the first call are raised. Later calls ignore OSError, because a file system may be unavailable for a moment;
    observers see then that the heartbeat stops.
    """

    def __init__(self, beat: Callable[[], None], patience: float) -> None:
        self._beat, self._interval = beat, patience / _BEATS
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            with suppress(OSError):
                self._beat()


class StalenessTimer:
    """Measure how long a value has not changed.

    A long time between two looks counts only as a short one: an observer that was suspended, or that blocked on an unavailable
    file system, does not know what happened meanwhile, and the watched process may have blocked on the same.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._value: object = self  # equal to no value that can be read
        self._quiet = self._looked = 0.0

    def look(self, value: object) -> bool:
        """Record the current value; return True once it has not changed for `patience` seconds."""
        now = time.monotonic()
        same = value == self._value
        self._quiet = self._quiet + min(now - self._looked, self._patience / _LOOKS) if same else 0.0
        self._value, self._looked = value, now
        return self._quiet >= self._patience


def pauses(patience: float) -> Iterator[None]:
    """Sleep before every iteration of a loop but the first: 10 ms, then longer, at most half a second."""
    pause = 0.01
    while True:
        yield
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5, patience / _BEATS)


class Process(NamedTuple):
    """A process, identified uniquely: `started` distinguishes it from a later process with its pid, `pid_scope` (boot id and pid
    namespace) from a process with its pid elsewhere. Both are None or empty where the system does not provide them."""

    host: str
    pid: int
    started: int | None
    pid_scope: str

    @classmethod
    def this(cls) -> Self:
        """Return the current process."""
        return cls(os.uname().nodename, os.getpid(), _stat(os.getpid())[1], _pid_scope())

    def is_alive(self) -> bool | None:
        """Return whether the process runs, or None for another host and where the system does not tell.

        A rebooted host of the same name counts as another host: names such as `localhost` are not unique.
        """
        if not self.pid_scope or self.started is None or (self.host, self.pid_scope) != (os.uname().nodename, _pid_scope()):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
        state, started = _stat(self.pid)
        return None if started is None else started == self.started and state not in "ZX"


def _stat(pid: int) -> tuple[str, int | None]:
    """Return a process's state, and when it started, in clock ticks since boot (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", None
    return fields[0], int(fields[19])


def _pid_scope() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
