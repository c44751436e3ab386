"""Stopping a run from outside: notes the signal, leaves the stopping to the loop, and asks the other ranks.

SIGTERM comes from Slurm before the time limit and from torchrun, SIGUSR1 from Slurm where it is told so, SIGINT from
Ctrl-C. Knows nothing of steps or checkpoints.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any, Self

NOTED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """While entered, the first signal of each kind is only noted. A second Ctrl-C stops at once, with KeyboardInterrupt.

    A second SIGTERM changes nothing: under Slurm a worker may get one from Slurm and one from torchrun. On leaving, the
    handlers are what they were. Enter it in the main thread; Python allows handlers only there.
    """

    def __init__(self, answer: Callable[[signal.Signals], None] | None = None) -> None:
        """`answer` is called when a signal comes, in its handler."""
        self._answer = answer
        self.received: signal.Signals | None = None
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """What a shell says of a program that the signal ended: 143 for SIGTERM; 0 where there was none."""
        return 128 + self.received if self.received else 0

    @property
    def requested(self) -> bool:
        """This rank was asked to stop. Ranks hear at different times, and agree in each step (`trainer.collectives`)."""
        return self._asked or self.received is not None

    def request(self) -> None:
        """Ask from within the program: a callback that has seen enough."""
        self._asked = True

    def __enter__(self) -> Self:
        for number in NOTED:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that Python did not set and cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        again, self.received = self.received is not None, signal.Signals(number)
        if self._answer and not again:
            self._answer(self.received)


@contextmanager
def held() -> Iterator[None]:
    """While entered, NOTED signals wait; and processes that are started here never get them.

    torchrun and Slurm signal a rank's children too. Without a child that writes or reads, a run cannot save and stop.
    """
    resource_tracker.ensure_running()  # else multiprocessing starts it in here, and lets SIGTERM through after that
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOTED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
