"""File names that a checkpoint's own files give: only relative ones that stay below their folder are opened."""

from __future__ import annotations

from typing import Any

from formats.errors import UserError, format_untrusted

_LONGEST = 255  # bytes of a name, of every file system in use


def stays_below(name: Any) -> bool:
    """Return whether `name` is a relative path, with slashes, to something below its folder. Symbolic links are not resolved.

    >>> [stays_below(name) for name in ("a.safetensors", "sub/a.safetensors", "../a.safetensors", "/a", "")]
    [True, True, False, False, False]
    """
    if not isinstance(name, str) or "\\" in name or "\0" in name:
        return False
    return all(part not in ("", ".", "..") and len(part) <= _LONGEST for part in name.split("/"))


def check_below(name: Any, *, source: str) -> None:
    """Raise UserError unless `name`, which the file `source` gives, stays below its folder."""
    if not stays_below(name):
        named = format_untrusted(name)
        raise UserError(f"`{source}` names the file `{named}`, which is not a valid path inside the directory: it was not opened")
