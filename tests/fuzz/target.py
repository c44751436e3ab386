"""What a reader under test is: the file that is damaged, how it is read, and what must be true of what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.bases import Files


@dataclass(frozen=True)
class Target:
    """A reader of `file` in one of the folders `bases` gives; `kind` of damage suits it."""

    name: str
    kind: str
    file: str
    bases: Callable[[], tuple[Files, ...]]
    read: Callable[[Path], Any]
    check: Callable[[Any, Path, Files], None]
    """Raises AssertionError if what was read (its folder and what that held before) is wrong."""

    share: int = 1
    """How many inputs it gets for one of another's: quick readers get more."""
