"""Retry attempts that fail for temporary reasons."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from formats.errors import TransientError


class RetryableError(Exception):
    """An attempt failed for a temporary reason, which is the message.

    `done`: bytes received before the failure. `wait`: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, *, done: int = 0, wait: float | None = None) -> None:
        super().__init__(reason)
        self.done = done
        self.wait = wait


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Number of attempts, and seconds between them: `first`, then doubled each time up to `longest`.

    `silence`: seconds without a byte after which a connection counts as dropped.
    """

    attempts: int = 6
    first: float = 0.5
    longest: float = 30.0
    silence: float = 60.0

    def pause(self, failed: int, asked: float | None) -> float:
        """Return the seconds before the next attempt, with random jitter of up to half."""
        usual = self.first * 2 ** (failed - 1) if asked is None else max(asked, self.first)
        return min(usual, self.longest) * random.uniform(1, 1.5)  # noqa: S311 - nobody gains from guessing it


def retry[Result](attempt: Callable[[], Result], policy: RetryPolicy, *, doing: str) -> Result:
    """Call `attempt` until it raises no RetryableError. Raises TransientError with `doing` and the last reason in the end."""
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
    """Read into `out` from a connection with repeated calls of `read`; RetryableError gives the number of bytes received."""
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
    """Describe an error without URLs: errors whose text may contain one give only their class."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
