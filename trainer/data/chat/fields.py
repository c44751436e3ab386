"""Classify fields of examples and messages: loss flags, metadata, and content that would be lost.

A field that affects what is learned is used, or the example is refused with its name. Metadata such as `id` or `source` is not
used, and is reported once for all examples. Whether a template renders a field of a message is for `unrendered`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from formats.errors import format_untrusted
from trainer.data.records import UnusableError, list_some

ANSWER_ROLES = ("assistant", "assistant_tool_call", "tool_calls", "model", "chatbot")
"""Roles of messages that the model writes. Templates name it `assistant`; Granite's, Mistral's, Gemma's and Cohere's take one of
the others as well."""

LEARNED_FIELDS = {"weight": True, "loss": True, "train": True, "training": True, "loss_weight": True, "loss_mask": True,
          "mask": False, "masked": False}  # fmt: skip
"""Fields that say whether a message is learned, and the value that means yes: OpenAI's `weight`, LlamaFactory's `loss`, Axolotl's
`train`, and similar ones."""

_METADATA = re.compile(
    r"(.*_)?(id|ids|idx|index|uuid|hash|url|uri|source|sources|dataset|timestamp|date|time|lang|language|locale|license|author|"
    r"category|categories|subcategory|tag|tags|difficulty|quality|score|scores|rating|ratings|count|"
    r"counts|length)|(created|updated|num|len)_.*|__.*__|created|updated|origin|model|model_name|generator|split|subset|version|"
    r"tokens|meta|metadata|turns|turn"
)
"""Names of metadata fields of an example or a message."""

_MEDIA = re.compile(r"(images?|videos?|audios?|functions|documents|tools)(_.*)?")


def is_metadata(name: str) -> bool:
    """Return whether a field of that name is metadata, not content."""
    return bool(_METADATA.fullmatch(name))


def has_content(value: Any) -> bool:
    """Return whether a value has anything but nulls and empty texts. Tables have null for a field that a row lacks."""
    if isinstance(value, dict):
        return any(has_content(member) for member in value.values())
    if isinstance(value, (list, tuple)):
        return any(has_content(member) for member in value)
    return value is not None and value != ""


def drop_fields(fields: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """Return the fields without the `ignored` ones."""
    return {name: value for name, value in fields.items() if name not in ignored}


def split_learned(message: dict[str, Any], number: int) -> tuple[dict[str, Any], bool]:
    """Return a message without its loss flags, and whether they say that it is learned. `number` counts from 1."""
    flags = [_learned_flag(message, name, number, positive=positive) for name, positive in LEARNED_FIELDS.items()]
    set_flags = [flag for flag in flags if flag is not None]
    if any(set_flags) and not all(set_flags):
        raise UnusableError("a message has contradictory loss flags", f"message {number}")
    if any(set_flags) and message.get("role") not in ANSWER_ROLES:
        raise UnusableError("a message that is not the assistant's is marked as learned", f"message {number}")
    return drop_fields(message, LEARNED_FIELDS), all(set_flags)


def _learned_flag(message: Mapping[str, Any], name: str, number: int, *, positive: bool) -> bool | None:
    value = message.get(name)
    if value is None:
        return None
    if not _is_number(value) or value not in (0, 1):
        raise UnusableError(f"a message's `{name}` is neither 0 nor 1", f"that of message {number} is {format_untrusted(value)}")
    return bool(value) == positive


def prepend_system(fields: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages with the example's `system` field as the first message, unless it is there already. Raises
    UnusableError
    if the two differ."""
    system = fields.get("system")
    if not system:
        return list(messages)
    if not isinstance(system, str):
        raise UnusableError("its `system` is not text", f"it is a {type(system).__name__}")
    first = messages[0] if messages else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if str(first.get("content")).strip() != system.strip():
        raise UnusableError("its `system` and its first message are different system prompts")
    return list(messages)


def check_unused_fields(fields: Mapping[str, Any], used: Collection[str], texts: Sequence[str], *, hint: str) -> list[str]:
    """Return the names of the fields that are not `used`. Raises UnusableError if the content of one of them is in none of
    `texts`,
    the texts to learn from."""
    unused = [name for name in fields if name not in used]
    for name in unused:
        _check_weight(name, fields[name])
    lost = [name for name in unused if _is_lost(name, fields[name], texts)]
    if lost:
        ignore = f"leave it out: `dataset.ignore_fields=[{','.join(lost)}]`"
        raise UnusableError(f"its {list_some(lost)} would be lost", "", hint=f"{hint}, or {ignore}")
    return unused


def _is_lost(name: str, value: Any, texts: Sequence[str]) -> bool:
    if is_metadata(name) or not has_content(value) or (name in LEARNED_FIELDS and _is_number(value)):
        return False
    return bool(_MEDIA.fullmatch(name)) or not _is_in(value, texts)


def _check_weight(name: str, value: Any) -> None:
    positive = LEARNED_FIELDS.get(name)
    if positive is not None and _is_number(value) and value != positive:
        raise UnusableError(f"its `{name}` asks for another loss weight than other examples", f"it is {format_untrusted(value)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _is_in(value: Any, texts: Sequence[str]) -> bool:
    if isinstance(value, str):
        return any(value.strip() in text for text in texts)
    return isinstance(value, list) and all(_is_in(text, texts) for text in _strings(value))


def _strings(value: Any) -> Iterator[Any]:
    """Yield the texts in nested lists and in messages; any other value unchanged."""
    if isinstance(value, list):
        for member in value:
            yield from _strings(member)
    elif isinstance(value, dict) and isinstance(value.get("content"), str):
        yield value["content"]
    else:
        yield value
