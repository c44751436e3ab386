"""Who is alive: a process shows it by changing a file again and again, and others believe what they see change.

Knows processes and clocks, refuses to know what the files are for. No time is compared with another host's and no file's
time is believed: an observer counts on its own clock how long what it read has stayed the same.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

PATIENCE = 60.0
"""Seconds without a change after which a process on another host counts as dead."""

_BEATS = 30  # within the patience of those who watch; on NFS a beat also makes this host see what others put beside it
_LOOKS = 10  # quiet ones that it takes at least to call a process dead


class Heartbeat:
    """Calls `beat` at the start of a block and again and again, on a thread of its own, until the block ends.

    What the first call raises is raised. Later ones may find the file system away for a moment: OSError is passed over,
    and whoever watches sees the silence.
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
    """Tells how long something has not changed, from one look to the next.

    A long time between two looks counts only as a short one. Whoever was stopped or hung on a file system that was away
    cannot know what happened meanwhile, and what is watched may have hung on the same.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._value: object = self  # equal to nothing that can be seen
        self._quiet = self._looked = 0.0

    def look(self, value: object) -> bool:
        """Take note of what is there now; true once it has not changed for all the patience there is."""
        now = time.monotonic()
        same = value == self._value
        self._quiet = self._quiet + min(now - self._looked, self._patience / _LOOKS) if same else 0.0
        self._value, self._looked = value, now
        return self._quiet >= self._patience


def pauses(patience: float) -> Iterator[None]:
    """Sleep before every turn of a loop but the first: 10 ms at first, then longer, half a second at most."""
    pause = 0.01
    while True:
        yield
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5, patience / _BEATS)


@dataclass(frozen=True, slots=True)
class Process:
    """A process for good: `started` tells it from a later one with its pid, `place` (one start of one system, one space
    of pids) from one with its pid elsewhere. Both are None or empty where the system does not say."""

    host: str
    pid: int
    started: int | None
    place: str

    @classmethod
    def this(cls) -> Self:
        """The one that asks."""
        return cls(socket.gethostname(), os.getpid(), _stat(os.getpid())[1], _place())

    def is_alive(self) -> bool | None:
        """None where it cannot be known: elsewhere, or where the system does not show it.

        A host of the same name that was started anew is elsewhere too: names such as `localhost` are not unique.
        """
        if not self.place or self.started is None or (self.host, self.place) != (socket.gethostname(), _place()):
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
    """A process's state, and when it started in ticks since the system did."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", None
    return fields[0], int(fields[19])


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
