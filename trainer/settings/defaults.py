"""One setting that this program decided, and why: what `precision`, `overlap` and `resolve` hand to each other.

Knows no setting by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Default:
    """`setting` is a path from the run's configuration, such as `model.overlap_p2p_comm`."""

    setting: str
    value: Any
    why: str


def holder_and_field(config: Any, setting: str) -> tuple[Any, str]:
    """The object that holds a setting, and the field's name."""
    part, _, name = setting.rpartition(".")
    for step in part.split("."):
        config = getattr(config, step)
    return config, name


def explicit_value(config: Any, setting: str) -> Any:
    """What somebody set a field to, or None where it still is as its class made it or does not exist."""
    part, name = holder_and_field(config, setting)
    value = getattr(part, name, None)
    return None if value == getattr(type(part), name, None) else value


def apply_defaults(config: Any, choices: list[Default]) -> list[Default]:
    """Set what differs; answers the choices that changed something."""
    changed = []
    for choice in choices:
        part, name = holder_and_field(config, choice.setting)
        if not hasattr(part, name) or getattr(part, name) != choice.value:
            setattr(part, name, choice.value)
            changed.append(choice)
    return changed
