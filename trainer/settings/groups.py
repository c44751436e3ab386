"""Settings that are one of several dataclasses, chosen by name: `peft=lora`, then `peft.dim=16`. In a document, `name` chooses.

Knows which names there are and where their classes stand; brings a class only when it is chosen.
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
    """What a name stands for, as its class makes it; None for `none`. UserError for a name that there is not."""
    known = GROUPS[setting]
    if name is None or name == NOTHING:
        return None
    if not isinstance(name, str) or name not in known:
        near = get_close_matches(str(name), known, 1)
        choices = ", ".join(f"`{choice}`" for choice in known)
        raise UserError(
            f"`{setting}` is `{format_untrusted(name)}`, it should be {choices} or `{NOTHING}`",
            hint=f"did you mean `{near[0]}`?" if near else "a method of your own is set in Python code",
        )
    module, _, kind = known[name].partition(":")
    return getattr(import_module(module), kind)()


def name_of(setting: str, value: Any) -> str | None:
    """The name that stands for a value's class; None where there is none, as for a class of one's own."""
    if value is None:
        return NOTHING
    kind = f"{type(value).__module__}:{type(value).__qualname__}"
    return next((name for name, where in GROUPS[setting].items() if where == kind), None)


def split_group(setting: str, value: Any, now: Any) -> tuple[Any, Mapping[str, Any]]:
    """Split a group's value, a name or a mapping with `name` and other settings, into the chosen object and the fields to set on
    it. Without another name the object stays as it is, with a recipe's own rank, for example."""
    if not isinstance(value, Mapping):
        return (now if now is not None and value == name_of(setting, now) else build(setting, value)), {}
    rest = {key: setting for key, setting in value.items() if key != "name"}
    if "name" not in value and now is None and rest:
        raise UserError(
            f"`{setting}` is not chosen, there is no `{setting}.{next(iter(rest))}`",
            hint=f"add `name`: {' or '.join(f'`{setting}`' for setting in GROUPS[setting])}",
        )
    stays = "name" not in value or value["name"] == name_of(setting, now)
    return (now if stays else build(setting, value["name"])), rest
