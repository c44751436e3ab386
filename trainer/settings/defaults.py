"""A default that the program decided for a setting, with the reason; passed between `precision`, `overlap` and `resolve`.

Knows no setting by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Default:
    """A resolved default. `setting` is a path in the run's configuration, such as `model.overlap_p2p_comm`."""

    setting: str
    value: Any
    why: str


def holder_and_field(config: Any, setting: str) -> tuple[Any, str]:
    """Return the object that holds a setting, and the field's name."""
    part, _, name = setting.rpartition(".")
    for step in part.split("."):
        config = getattr(config, step)
    return config, name


_BY_NAME = "_settings_by_name"


def note_explicit(holder: Any, name: str) -> None:
    """Remember that a command line or a document has set this field: its value may be its class's default."""
    if hasattr(holder, "__dict__"):
        vars(holder).setdefault(_BY_NAME, set()).add(name)


def forget_explicit(holder: Any, name: str) -> None:
    """Take a field for one that nobody has set."""
    getattr(holder, _BY_NAME, set[str]()).discard(name)


def explicit_value(config: Any, setting: str) -> Any:
    """Return the value that a field was set to, or None where it was not set, or does not exist.

    Python code that assigns a class's default has not set anything: the field looks like one that nobody has set.
    """
    part, name = holder_and_field(config, setting)
    return getattr(part, name, None) if name in getattr(part, _BY_NAME, ()) else changed_value(config, setting)


def changed_value(config: Any, setting: str) -> Any:
    """Return the value of a field, or None where it has its class's default or does not exist."""
    part, name = holder_and_field(config, setting)
    value = getattr(part, name, None)
    return None if value == getattr(type(part), name, None) else value


def apply_defaults(config: Any, choices: list[Default]) -> list[Default]:
    """Set what differs. Returns the defaults that changed something."""
    changed = []
    for choice in choices:
        part, name = holder_and_field(config, choice.setting)
        if not hasattr(part, name) or getattr(part, name) != choice.value:
            setattr(part, name, choice.value)
            changed.append(choice)
    return changed
