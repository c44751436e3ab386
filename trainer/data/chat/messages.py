"""Messages of examples as chat templates take them, whichever family of data sets wrote them.

Knows OpenAI's messages, ShareGPT's turns, content in parts and calls of tools. Knows no template and no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from formats.errors import format_untrusted
from formats.faults import fault
from trainer.data.chat.fields import has_content, is_about, learned_as_said, without
from trainer.data.records import UnusableError, names

ANSWERS, TOOL = "assistant", "tool"
_ROLES = {
    "human": "user", "user": "user", "gpt": ANSWERS, "assistant": ANSWERS, "function_call": ANSWERS, "system": "system",
    "tool": TOOL, "function": TOOL, "observation": TOOL,
}  # fmt: skip
"""Who speaks in ShareGPT's `from`, as templates call them."""

type Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """All that a chat template is given."""

    messages: tuple[Message, ...]
    tools: list[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template's own, such as `enable_thinking`."""

    def until(self, end: int) -> Conversation:
        """The first `end` messages."""
        return replace(self, messages=self.messages[:end])


def messages_of(fields: Mapping[str, Any], name: str, ignored: Collection[str] = ()) -> tuple[list[Message], list[bool]]:
    """The messages in that field without what is `ignored`, and of each whether it is learned if it is an answer. Roles and
    texts are checked, ShareGPT's `from` and `value` have the names that templates know, and parts are one text."""
    value = fields[name]
    if not isinstance(value, list) or not value:
        raise UnusableError(
            f"its `{name}` is no list of messages", f"it is {'empty' if value == [] else f'a {type(value).__name__}'}"
        )
    found = [_message(one, number, ignored) for number, one in enumerate(value, 1)]
    return [message for message, _ in found], [learned for _, learned in found]


def _message(found: Any, number: int, ignored: Collection[str]) -> tuple[Message, bool]:
    if not isinstance(found, dict):
        raise UnusableError("a message is no object", f"message {number} is a {type(found).__name__}")
    found = without(found, ignored)
    if found.get("role") is None and found.get("from") is not None:
        found = _of_sharegpt(found, number)
    if not isinstance(found.get("role"), str):
        raise UnusableError("a message has no `role`", f"message {number} has {names(found)}")
    found, learned = learned_as_said(found, number)
    if found.get("tool_calls"):
        found["tool_calls"] = _calls(found["tool_calls"], number)
    if isinstance(found.get("content"), list):
        found["content"] = "".join(_parts(found["content"], number))
    _check_said(found, number)
    return {name: value for name, value in found.items() if value is not None}, learned


def _check_said(found: Message, number: int) -> None:
    content = found.get("content")
    if content is not None and not isinstance(content, str):
        raise UnusableError("a message's `content` is no text", f"that of message {number} is a {type(content).__name__}")
    further = (name for name in found if name not in ("role", "content") and not is_about(name))
    said = content or any(has_content(found[name]) for name in further)
    if content is None and not said:
        raise UnusableError("a message has no `content`", f"message {number} has {names(found)}")
    if found["role"] == ANSWERS and not said:
        raise UnusableError("an answer is empty", f"message {number}")


def _of_sharegpt(found: Mapping[str, Any], number: int) -> dict[str, Any]:
    speaker, value = found["from"], found.get("value")
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UnusableError("it is not known who speaks", f"`from` of message {number} is `{str(speaker)[:40]}`")
    rest = without(found, ("from", "value"))
    if speaker == "function_call":
        return {**rest, "role": role, "tool_calls": value}
    return {**rest, "role": role, "content": value}


def _parts(content: Sequence[Any], number: int) -> Iterator[str]:
    """The texts of a message in parts, as multi-modal models have them."""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", None) or not isinstance(text, str):
            what = f"a `{format_untrusted(kind)}`" if kind else f"a {type(part).__name__} without text"
            raise UnusableError("a part of a message is no text", f"{what} in message {number}")
        more = [name for name, value in part.items() if name not in ("type", "text") and has_content(value)]
        if more:
            raise UnusableError("a part of a message has more than text", f"{names(more)} in message {number}")
        yield text


def _calls(value: Any, number: int) -> list[Any]:
    """Calls of tools, their arguments as objects: OpenAI has them as JSON, and templates write objects."""
    found = from_json(value, f"a message's `tool_calls` are not JSON: those of message {number}")
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) for call in calls):
        raise UnusableError("a message's `tool_calls` are no list of objects", f"those of message {number}")
    return [_call(call) for call in calls]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return dict(call)  # text, then
    return {**call, "arguments": parsed if isinstance(parsed, dict) else arguments}


def tools_of(fields: Mapping[str, Any]) -> list[Any] | None:
    """The tools that are offered. Many data sets keep them as JSON: tables have no room for schemas that differ."""
    found = from_json(fields.get("tools"), "its `tools` are not JSON")
    if not found:
        return None
    found = found if isinstance(found, list) else [found]
    found = [from_json(one, "its `tools` are not JSON") for one in found]
    if not all(isinstance(one, dict) for one in found):
        raise UnusableError("its `tools` are no list of objects")
    return found


def options_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Variables for the template, as TRL has them in `chat_template_kwargs`."""
    found = from_json(fields.get("chat_template_kwargs"), "its `chat_template_kwargs` are not JSON") or {}
    if not isinstance(found, dict):
        raise UnusableError("its `chat_template_kwargs` are no object", f"they are {format_untrusted(found)}")
    return {name: value for name, value in found.items() if value is not None}


def from_json(value: Any, wrong: str) -> Any:
    """A value that may be there as JSON. UnusableError, which says what is `wrong`, where it is text and no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise UnusableError(wrong, fault(error)) from error
