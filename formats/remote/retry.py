"""Trying again: what is worth it, how long to wait in between, when to give up. Knows no protocol."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from formats.errors import TransientError


class RetryableError(Exception):
    """An attempt that failed for a reason that may pass; the message is the reason.

    `done` counts the bytes that had arrived by then, `wait` the seconds that the other side asks for.
    """

    def __init__(self, reason: str, *, done: int = 0, wait: float | None = None) -> None:
        super().__init__(reason)
        self.done = done
        self.wait = wait


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often to try, and how many seconds to wait: `first`, then twice as long each time, at most `longest`.

    `silence` is the number of seconds without a byte after which a connection counts as dropped.
    """

    attempts: int = 6
    first: float = 0.5
    longest: float = 30.0
    silence: float = 60.0

    def pause(self, failed: int, asked: float | None) -> float:
        """Seconds before the next attempt. A random part of up to half keeps threads from coming back all at once."""
        usual = self.first * 2 ** (failed - 1) if asked is None else max(asked, self.first)
        return min(usual, self.longest) * random.uniform(1, 1.5)  # noqa: S311 - nobody gains from guessing it


def retry[Result](attempt: Callable[[], Result], policy: RetryPolicy, *, doing: str) -> Result:
    """Call `attempt` until it does not raise BrokenError; in the end, TransientError says what we were
    `doing` and the last reason."""
    failed = 0
    while True:
        try:
            return attempt()
        except RetryableError as error:
            failed += 1
            if failed >= policy.attempts:
                raise TransientError(
                    f"{doing} failed {failed} times; the last time: {error}",
                    hint="check the network and the server, then run it again",
                ) from None
            pause = policy.pause(failed, error.wait)
        time.sleep(pause)


def fill(out: memoryview, read: Callable[[memoryview], int], errors: tuple[type[Exception], ...]) -> None:
    """Fill `out` from a connection; `read` puts some bytes into what it is given. BrokenError says how much came."""
    done = 0
    while done < len(out):
        try:
            count = read(out[done:])
        except errors as error:
            raise RetryableError(words(error), done=done) from None
        if not count:
            raise RetryableError(f"the connection ended after {done} of {len(out)} bytes", done=done)
        done += count


def words(error: Exception) -> str:
    """What went wrong, in words without URLs: of errors whose text may hold one, no more than the kind."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
