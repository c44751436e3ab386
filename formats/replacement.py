"""Describe the content of a target, and decide whether an output may replace it: for directories and object stores alike.

Which file names an output can have is left to the caller's rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from formats.errors import TransientError, UserError, printable


@dataclass(frozen=True, slots=True)
class Present:
    """The content of a target. Two are equal if nothing was changed, added or replaced between them."""

    label: str
    """The path or URL, for messages."""

    entries: Mapping[str, object]
    """Each file by its relative name, with a value that changes when the file does. Names of empty folders end in a slash, links
    are named `name -> target`, and other non-files have a note after the name: no output has any of these."""

    identity: object = None
    """Device and inode of a directory."""

    read: Callable[[str], bytes] = field(default=lambda _name: b"", compare=False)
    """Return the content of a file."""


type Rule = Callable[[Present], None]
"""Raises UserError unless everything present may be removed for a new output."""


def already_exists(label: object, *, more: str = "") -> UserError:
    """Return the error for a target that exists and must not be replaced."""
    return UserError(f"`{label}` already exists", hint=f"choose another place, or replace it with `--overwrite`{more}")


def check_unchanged(before: Present | None, now: Present | None, *, then: str) -> None:
    """Raise TransientError if a target changed after it was checked. `then` is what to do afterwards.

    A removed target is no error: it was to be replaced anyway.
    """
    if now is None or now == before:
        return
    if before is None:
        raise TransientError(f"`{now.label}` appeared while it was being made", hint=f"move it away, then {then}")
    raise TransientError(
        f"`{now.label}` changed while its replacement was being made: {_difference(before, now)}",
        hint=f"move away what is to be kept, then {then}",
    )


def _difference(before: Present, now: Present) -> str:
    """Describe a difference: the first new entry by name, else the first changed or removed one."""
    new = now.entries.keys() - before.entries.keys()
    if now.identity != before.identity:
        return "another directory has its name" + (f", with `{first(new)}`" if new else "")
    if new:
        return f"`{first(new)}` appeared"
    name = min(name for name in before.entries if before.entries[name] != now.entries.get(name))
    return f"`{printable(name)}` {'was changed' if name in now.entries else 'was removed'}"


def first(names: Iterable[str]) -> str:
    """Return the first name in alphabetical order, for messages."""
    return printable(min(names))
