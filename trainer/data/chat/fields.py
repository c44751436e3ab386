"""Fields of examples and of their messages: which say whether an answer is learned, which are about an example, and which would
be lost.

What changes what would be learned is used, or the example is refused by name. What is about an example, such as `id` or
`source`, is not used, and named once for all of them. Which field of a message is used is for its template to show.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from formats.errors import format_untrusted
from trainer.data.records import UnusableError, names

LEARNS = {"weight": True, "loss": True, "train": True, "training": True, "loss_weight": True, "loss_mask": True,
          "mask": False, "masked": False}  # fmt: skip
"""Fields that say whether a message is learned, and of which value that is said: OpenAI's `weight`, LlamaFactory's `loss`,
Axolotl's `train`, and their kin."""

_ABOUT = re.compile(
    r"(.*_)?(id|ids|idx|index|uuid|hash|url|uri|source|sources|dataset|timestamp|date|time|lang|language|locale|license|author|"
    r"category|categories|subcategory|tag|tags|difficulty|quality|score|scores|rating|ratings|count|"
    r"counts|length)|(created|updated|num|len)_.*|__.*__|created|updated|origin|model|model_name|generator|split|subset|version|"
    r"tokens|meta|metadata|turns|turn"
)
"""Names of fields that say something about an example or a message, and nothing in it."""

_MEDIA = re.compile(r"(images?|videos?|audios?|functions|documents|tools)(_.*)?")


def is_about(name: str) -> bool:
    """Is a field of that name about an example rather than part of what is said in it?"""
    return bool(_ABOUT.fullmatch(name))


def has_content(value: Any) -> bool:
    """Does a field say anything? Tables fill what a row does not have with null."""
    if isinstance(value, dict):
        return any(has_content(one) for one in value.values())
    if isinstance(value, (list, tuple)):
        return any(has_content(one) for one in value)
    return value is not None and value != ""


def without(found: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """The fields that are not `ignored`."""
    return {name: value for name, value in found.items() if name not in ignored}


def learned_as_said(found: dict[str, Any], number: int) -> tuple[dict[str, Any], bool]:
    """A message without what says whether it is learned; and whether it is. `number` counts from 1."""
    wanted = [said for name, positive in LEARNS.items() if (said := _wanted(found, name, number, positive=positive)) is not None]
    if any(wanted) and not all(wanted):
        raise UnusableError("a message says both that it is learned and that it is not", f"message {number}")
    if any(wanted) and found.get("role") != "assistant":
        raise UnusableError("a message asks to be learned, and is not the assistant's", f"message {number}")
    return without(found, LEARNS), all(wanted)


def _wanted(found: Mapping[str, Any], name: str, number: int, *, positive: bool) -> bool | None:
    value = found.get(name)
    if value is None:
        return None
    if not _is_number(value) or value not in (0, 1):
        raise UnusableError(f"a message's `{name}` is neither 0 nor 1", f"that of message {number} is {format_untrusted(value)}")
    return bool(value) == positive


def with_system(fields: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages after what the example's own `system` says, unless the first of them says the same."""
    system = fields.get("system")
    if not system:
        return list(messages)
    if not isinstance(system, str):
        raise UnusableError("its `system` is no text", f"it is a {type(system).__name__}")
    first = messages[0] if messages else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if str(first.get("content")).strip() != system.strip():
        raise UnusableError("its `system` and its first message are different system prompts")
    return list(messages)


def check_example(fields: Mapping[str, Any], used: Collection[str], texts: Sequence[str], *, hint: str) -> list[str]:
    """The names of an example's fields that are not used. UnusableError for those that say something which is in none of
    `texts`, what is learned from."""
    unused = [name for name in fields if name not in used]
    for name in unused:
        _check_weight(name, fields[name])
    lost = [name for name in unused if _is_lost(name, fields[name], texts)]
    if lost:
        ignore = f"leave it out: `dataset.ignore_fields=[{','.join(lost)}]`"
        raise UnusableError(f"its {names(lost)} would be left out", "", hint=f"{hint}, or {ignore}")
    return unused


def _is_lost(name: str, value: Any, texts: Sequence[str]) -> bool:
    if is_about(name) or not has_content(value) or (name in LEARNS and _is_number(value)):
        return False
    return bool(_MEDIA.fullmatch(name)) or not _is_in(value, texts)


def _check_weight(name: str, value: Any) -> None:
    positive = LEARNS.get(name)
    if positive is not None and _is_number(value) and value != positive:
        raise UnusableError(
            f"its `{name}` asks for another weight than that of other examples", f"it is {format_untrusted(value)}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _is_in(value: Any, texts: Sequence[str]) -> bool:
    if isinstance(value, str):
        return any(value.strip() in text for text in texts)
    return isinstance(value, list) and all(_is_in(one, texts) for one in _strings(value))


def _strings(value: Any) -> Iterator[Any]:
    """The texts in lists and messages of another field; anything else as it is."""
    if isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, dict) and isinstance(value.get("content"), str):
        yield value["content"]
    else:
        yield value
