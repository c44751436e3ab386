"""The one exception that speaks to a user. Everything else that escapes is our bug and shows its traceback."""

from __future__ import annotations

import os
from typing import Any, cast


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


def format_untrusted(value: Any, *, inside: bool = False) -> str:
    """A value from a file, for a message: short whatever it is. Numbers of thousands of digits cannot be printed, and what is
    nested, or holds one thing many times, can take forever to."""
    if isinstance(value, (list, tuple)) and not inside:
        parts = cast("list[Any]", value)
        return f"[{', '.join(format_untrusted(part, inside=True) for part in parts[:8])}{', …' if len(parts) > 8 else ''}]"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"a number of {value.bit_length()} bits"
    value = cast("Any", value)
    if value is None or isinstance(value, (str, int, float)):
        return str(value)[:100]
    return f"a {type(value).__name__}"


def is_text(name: str) -> bool:
    """Can it be written as UTF-8? File names and JSON may hold halves of surrogate pairs, which cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(name: str) -> str:
    """A name as it is, or with backslash escapes for what is not UTF-8: `caf\\xe9`."""
    if is_text(name):
        return name
    try:
        return os.fsencode(name).decode(errors="backslashreplace")
    except UnicodeEncodeError:  # not the name of any file here
        return name.encode(errors="backslashreplace").decode()
