"""The exceptions whose text is written for a user. Any other exception that escapes is a bug and shows its traceback."""

from __future__ import annotations

import os
from typing import Any, cast


class UserError(Exception):
    """An error that a user can fix. The message names what is wrong, with both values; `hint` says what to do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}\n\nhint: {self.hint}" if self.hint else message


class TransientError(UserError):
    """An error that a retry may cure: network, peer process, full disk."""


def format_untrusted(value: Any, *, inside: bool = False) -> str:
    """Format an untrusted value for a message, in bounded length and time."""
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
    """Return whether `name` can be encoded as UTF-8. File names and JSON may hold lone surrogates, which cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(name: str) -> str:
    """Return a name with backslash escapes for bytes that are not UTF-8: `caf\\xe9`."""
    if is_text(name):
        return name
    try:
        return os.fsencode(name).decode(errors="backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that no file name can hold
        return name.encode(errors="backslashreplace").decode()
