"""Config groups: settings that are one of several dataclasses, chosen by name: `peft=lora`, then `peft.dim=16`; `name` in YAML.

Knows the names and where their classes are defined; imports a class only when it is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from formats.errors import UserError, format_untrusted

GROUPS: Mapping[str, Mapping[str, str]] = {"peft": {"lora": "trainer.peft.lora:LoRA", "dora": "trainer.peft.dora:DoRA"}}
NOTHING = "none"


def build(setting: str, name: Any) -> Any:
    """Return an instance of the class that a name stands for; None for `none`. Raises UserError for an unknown name."""
    classes = GROUPS[setting]
    if name is None or name == NOTHING:
        return None
    if not isinstance(name, str) or name not in classes:
        near = get_close_matches(str(name), classes, 1)
        choices = ", ".join(f"`{choice}`" for choice in classes)
        raise UserError(
            f"`{setting}` is `{format_untrusted(name)}`, it should be {choices} or `{NOTHING}`",
            hint=f"did you mean `{near[0]}`?" if near else "a method of your own is set in Python code",
        )
    module, _, kind = classes[name].partition(":")
    return getattr(import_module(module), kind)()


def name_of(setting: str, value: Any) -> str | None:
    """Return the name of a value's class; None where it has none, as for a class of the user's own."""
    if value is None:
        return NOTHING
    kind = f"{type(value).__module__}:{type(value).__qualname__}"
    return next((name for name, location in GROUPS[setting].items() if location == kind), None)


def split_group(setting: str, value: Any, current: Any) -> tuple[Any, Mapping[str, Any]]:
    """Split a group's value, a name or a mapping with `name` and other settings, into the chosen object and the fields to set on
    it. Without another name the object stays as it is, with a recipe's own rank, for example."""
    if not isinstance(value, Mapping):
        return (current if current is not None and value == name_of(setting, current) else build(setting, value)), {}
    fields = {key: setting for key, setting in value.items() if key != "name"}
    if "name" not in value and current is None and fields:
        raise UserError(
            f"`{setting}` is not chosen, there is no `{setting}.{next(iter(fields))}`",
            hint=f"add `name`: {' or '.join(f'`{setting}`' for setting in GROUPS[setting])}",
        )
    stays = "name" not in value or value["name"] == name_of(setting, current)
    return (current if stays else build(setting, value["name"])), fields
