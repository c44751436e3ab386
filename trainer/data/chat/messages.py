"""Parse messages of several dataset formats into the messages that chat templates take.

Reads OpenAI's messages, ShareGPT's turns, content in parts, and tool calls.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from formats.errors import format_untrusted
from formats.faults import fault
from trainer.data.chat.fields import ANSWER_ROLES, drop_fields, has_content, is_metadata, split_learned
from trainer.data.records import UnusableError, list_some

ASSISTANT, TOOL = "assistant", "tool"
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Fields of thoughts, in the order in which transformers passes them to templates."""

_ROLES = {
    "human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "function_call": ASSISTANT, "system": "system",
    "tool": TOOL, "function": TOOL, "observation": TOOL,
}  # fmt: skip
"""Roles of templates by the values of ShareGPT's `from`."""

type Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """The inputs of a chat template."""

    messages: tuple[Message, ...]
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of this template, such as `enable_thinking`."""

    @property
    def answers(self) -> list[int]:
        """The numbers of the messages that the model writes, from 0."""
        return [number for number, message in enumerate(self.messages) if message["role"] in ANSWER_ROLES]

    def truncated(self, end: int) -> Conversation:
        """Return the conversation up to message `end`, exclusive."""
        return replace(self, messages=self.messages[:end])

    def followed_by(self, message: Message) -> Conversation:
        """Return the conversation with one more message."""
        return replace(self, messages=(*self.messages, message))

    def with_contents(self, content: str | None) -> Conversation:
        """Return the conversation with this `content` in messages without one."""
        return replace(self, messages=tuple({"content": content, **message} for message in self.messages))

    def with_json_arguments(self) -> Conversation:
        """Return the conversation with the arguments of tool calls as JSON texts."""
        return replace(self, messages=tuple(_with_json_arguments(message) for message in self.messages))


def parse_messages(fields: Mapping[str, Any], name: str, ignored: Collection[str] = ()) -> tuple[list[Message], list[bool]]:
    """Return the messages of a field without `ignored` fields, and for each whether it is learned if it is an answer.

    ShareGPT's `from` and `value` become `role` and `content`, and parts are joined to one text. Raises UnusableError for a
    message without a role or content.
    """
    value = fields[name]
    if not isinstance(value, list) or not value:
        raise UnusableError(
            f"its `{name}` is not a list of messages", f"it is {'empty' if value == [] else f'a {type(value).__name__}'}"
        )
    parsed = [_parse_message(message, number, ignored) for number, message in enumerate(value, 1)]
    return [message for message, _ in parsed], [learned for _, learned in parsed]


def _parse_message(value: Any, number: int, ignored: Collection[str]) -> tuple[Message, bool]:
    if not isinstance(value, dict):
        raise UnusableError("a message is not an object", f"message {number} is a {type(value).__name__}")
    message = drop_fields(value, ignored)
    if message.get("role") is None and message.get("from") is not None:
        message = _from_sharegpt(message, number)
    if not isinstance(message.get("role"), str):
        raise UnusableError("a message has no `role`", f"message {number} has {list_some(message)}")
    message, learned = split_learned(message, number)
    if message.get("tool_calls"):
        message["tool_calls"] = _parse_tool_calls(message["tool_calls"], number)
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_text_parts(message["content"], number))
    _check_content(message, number)
    return {name: member for name, member in message.items() if member is not None}, learned


def _check_content(message: Message, number: int) -> None:
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise UnusableError("a message's `content` is not text", f"that of message {number} is a {type(content).__name__}")
    others = (name for name in message if name not in ("role", "content") and not is_metadata(name))
    is_filled = content or any(has_content(message[name]) for name in others)
    if content is None and not is_filled:
        raise UnusableError("a message has no `content`", f"message {number} has {list_some(message)}")
    if message["role"] in ANSWER_ROLES and not is_filled:
        raise UnusableError("an answer is empty", f"message {number}")


def _from_sharegpt(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    speaker, value = message["from"], message.get("value")
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UnusableError("a message has an unknown `from`", f"that of message {number} is `{str(speaker)[:40]}`")
    fields = drop_fields(message, ("from", "value"))
    if speaker == "function_call":
        return {**fields, "role": role, "tool_calls": value}
    return {**fields, "role": role, "content": value}


def _text_parts(content: Sequence[Any], number: int) -> Iterator[str]:
    """Yield the texts of a message in parts, the format of multi-modal models."""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", None) or not isinstance(text, str):
            description = f"a `{format_untrusted(kind)}`" if kind else f"a {type(part).__name__} without text"
            raise UnusableError("a part of a message is not text", f"{description} in message {number}")
        extra = [name for name, value in part.items() if name not in ("type", "text") and has_content(value)]
        if extra:
            raise UnusableError("a part of a message has more than text", f"{list_some(extra)} in message {number}")
        yield text


def _parse_tool_calls(value: Any, number: int) -> list[Any]:
    """Return tool calls with their arguments as objects: in OpenAI's format arguments are JSON, and templates render objects."""
    decoded = decode_json(value, f"a message's `tool_calls` are not JSON: those of message {number}")
    calls = decoded if isinstance(decoded, list) else [decoded]
    if not all(isinstance(call, dict) for call in calls):
        raise UnusableError("a message's `tool_calls` are not a list of objects", f"those of message {number}")
    return [_parse_tool_call(call) for call in calls]


def _parse_tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _parse_tool_call(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return dict(call)  # plain text
    return {**call, "arguments": parsed if isinstance(parsed, dict) else arguments}


def _with_json_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_with_json_argument(call) for call in message["tool_calls"]]}


def _with_json_argument(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_json_argument(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if isinstance(arguments, dict) else call


def parse_tools(fields: Mapping[str, Any]) -> list[Any] | None:
    """Return the tools of an example, or None. Many datasets store them as JSON, since the schemas differ from row to row."""
    tools = decode_json(fields.get("tools"), "its `tools` are not JSON")
    if not tools:
        return None
    tools = [decode_json(tool, "its `tools` are not JSON") for tool in (tools if isinstance(tools, list) else [tools])]
    if not all(isinstance(tool, dict) for tool in tools):
        raise UnusableError("its `tools` are not a list of objects")
    return tools


def parse_template_kwargs(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template variables of an example: `chat_template_kwargs`, TRL's name."""
    kwargs = decode_json(fields.get("chat_template_kwargs"), "its `chat_template_kwargs` are not JSON") or {}
    if not isinstance(kwargs, dict):
        raise UnusableError("its `chat_template_kwargs` are not an object", f"they are {format_untrusted(kwargs)}")
    return {name: value for name, value in kwargs.items() if value is not None}


def decode_json(value: Any, reason: str) -> Any:
    """Decode a value that may be JSON text; return any other value unchanged. Raises UnusableError with `reason` for other
    text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise UnusableError(reason, fault(error)) from error
