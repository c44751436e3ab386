"""The one exception that speaks to a user. Everything else that escapes is our bug and shows its traceback."""

from __future__ import annotations


class UserError(Exception):
    """What is wrong, with names and both values; `hint` says what to do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}\n\nhint: {self.hint}" if self.hint else message


class TransientError(UserError):
    """What may go well when the same is tried again: a network or another process failed, or a disk was full."""
