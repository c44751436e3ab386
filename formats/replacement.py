"""What is at a target, and whether an output may take its place: one rule for directories and object stores.

Knows no names of files: which of them an output can have is the caller's rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from formats.errors import TransientError, UserError, printable


@dataclass(frozen=True, slots=True)
class Present:
    """Everything at a target. Two are equal if nothing was changed, added or replaced between them."""

    label: str
    """The path or URL, for messages."""

    entries: Mapping[str, object]
    """Each file below by its relative name, with what changes when the file does. An empty folder ends in a slash; a link is
    named `name -> where it leads`, and what else is no file has that said behind its name: neither is one of an output's."""

    identity: object = None
    """What a directory is besides its name."""

    read: Callable[[str], bytes] = field(default=lambda _name: b"", compare=False)
    """The content of one of the files."""


type Rule = Callable[[Present], None]
"""Raises UserError unless all that is present may be removed for a new output."""


def already_exists(label: object, *, more: str = "") -> UserError:
    """The error for a target that is there, where nothing was said of replacing it."""
    return UserError(f"`{label}` already exists", hint=f"choose another place, or replace it with `--overwrite`{more}")


def check_unchanged(before: Present | None, now: Present | None, *, then: str) -> None:
    """Raise TransientError if something came to a target after it was checked. `then` is what to do afterwards.

    A target that is gone is no error: somebody moved away what was to be replaced.
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
    """What differs, of the entries the first by name: rather one that came than one that was changed or is gone."""
    came = now.entries.keys() - before.entries.keys()
    if now.identity != before.identity:
        return "another directory has its name" + (f", with `{first(came)}`" if came else "")
    if came:
        return f"`{first(came)}` appeared"
    name = min(name for name in before.entries if before.entries[name] != now.entries.get(name))
    return f"`{printable(name)}` {'was changed' if name in now.entries else 'is gone'}"


def first(names: Iterable[str]) -> str:
    """The first of some names in the order of the alphabet, for messages."""
    return printable(min(names))
