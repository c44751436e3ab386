"""Record signals that ask a run to stop. The loop stops it, and lets ranks agree on that.

SIGTERM is sent by Slurm before the time limit and by torchrun, SIGUSR1 by Slurm if configured, SIGINT by Ctrl-C.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any, Self

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """While entered, record signals instead of ending the process. A second Ctrl-C raises KeyboardInterrupt.

    A second SIGTERM changes nothing: under Slurm a process may get one from Slurm and one from torchrun. On leaving, the
    handlers from before are restored. Enter it in the main thread: Python allows handlers only there.
    """

    def __init__(self, answer: Callable[[signal.Signals], None] | None = None) -> None:
        """Call `answer` with the first signal, in its handler."""
        self._answer = answer
        self.received: signal.Signals | None = None
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """The exit status of a program that the signal ended: 143 for SIGTERM; 0 without a signal."""
        return 128 + self.received if self.received else 0

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop. Ranks may be asked at different times, and agree in each step."""
        return self._asked or self.received is not None

    def request(self) -> None:
        """Ask the run to stop, from a callback."""
        self._asked = True

    def __enter__(self) -> Self:
        for number in HANDLED:
            self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that Python did not set and cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _record(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        again, self.received = self.received is not None, signal.Signals(number)
        if self._answer and not again:
            self._answer(self.received)


@contextmanager
def blocked() -> Iterator[None]:
    """Block HANDLED signals inside this context; child processes that are started in it never get them.

    torchrun and Slurm signal a rank's children too. Without the children that write and read, a run cannot save and stop.
    """
    resource_tracker.ensure_running()  # else multiprocessing starts it in here, and lets SIGTERM through after that
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
