"""Find content of a conversation that a chat template does not render.

Marks are added to all content, the marked conversation is rendered once, and the marks are searched in the text. Content whose
mark is missing is changed or removed by itself, and counts as rendered if the text changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.data.chat.chat_template import Template
from trainer.data.chat.fields import ANSWER_ROLES, has_content, is_metadata
from trainer.data.chat.messages import THOUGHTS, TOOL, Conversation, Message
from trainer.data.records import UnusableError

_BEFORE, _AFTER = (
    "\U00010080",
    "\U00010081",
)  # around the number of a mark: letters of Linear B, which Python's repr and JSON do not escape
_MARK = re.compile(f"{_BEFORE}\\d+{_AFTER}")
_WORDS = re.compile(r"(<[^<>\s]*>|\[/?[A-Z_]+\])|[^\s<\[]+|[<\[]")
"""Tags, which templates search for, and the words between them."""

_TOOLS = (TOOL, "function", "ipython")


@dataclass(frozen=True, slots=True)
class Piece:
    """The path of a piece of content in a conversation, outermost key first."""

    path: tuple[str | int, ...]

    @property
    def message(self) -> int | None:
        """Return the number of its message, from 0; None if it is outside the messages."""
        return int(self.path[1]) if self.path[0] == "messages" else None

    @property
    def field(self) -> str:
        """Return the field of the message, or of the example."""
        return str(self.path[2] if self.path[0] == "messages" else self.path[0])


def check_rendered(template: Template, conversation: Conversation, text: str) -> set[int]:
    """Return the numbers of the answers and tool messages that the template renders differently once messages follow them.

    `text` is the rendered conversation. Such messages have content that is rendered only while they are the last message: Qwen3's
    template drops earlier thoughts. Raises UnusableError, with the name, for all other content that is not in `text`.
    """
    rewritten = set[int]()
    for piece in find_unrendered(template, conversation, text):
        number = piece.message
        if number is None:
            raise _not_rendered(f"its `{piece.field}`", piece.field)
        role = conversation.messages[number]["role"]
        if role not in (*ANSWER_ROLES, TOOL) or not _was_rendered(template, conversation, piece, number):
            part = f"of `{role}`" if piece.field == "content" else f"its `{piece.field}`"
            raise _not_rendered(f"message {number + 1}, {part}", piece.field)
        rewritten.add(number)
    return rewritten


def _was_rendered(template: Template, conversation: Conversation, piece: Piece, number: int) -> bool:
    """Return whether the piece is rendered if its message is the last one."""
    if number == len(conversation.messages) - 1:
        return False
    prefix = conversation.truncated(number + 1)
    text = template.try_render(prefix)
    return text is not None and not _is_unrendered(template, prefix, text, piece)


def _not_rendered(part: str, field: str) -> UnusableError:
    ignored = "" if field == "content" else f": `dataset.ignore_fields=[{field}]`"
    return UnusableError(
        "the chat template does not render all content",
        part,
        hint=f"use a template that renders it (`dataset.chat_template=FILE`), or remove it from the example{ignored}",
    )


def find_unrendered(template: Template, conversation: Conversation, text: str) -> list[Piece]:
    """Return the pieces that are not in `text`, the rendered conversation."""
    pieces = list(_pieces(conversation))
    marked = {piece: _with_marks(_get(conversation, piece.path), str(number)) for number, piece in enumerate(pieces)}
    probe = template.try_render(_replace(conversation, marked))
    comparable = probe is not None and _MARK.sub("", probe) == text
    return [
        piece
        for piece, value in marked.items()
        if not (comparable and _is_in(value, probe or "")) and _is_unrendered(template, conversation, text, piece)
    ]


def _pieces(conversation: Conversation) -> Iterator[Piece]:
    for number, message in enumerate(conversation.messages):
        for name, value in message.items():
            if name == "role" or is_metadata(name) or not has_content(value):
                continue
            if name == "tool_calls":
                yield from _pieces_of_calls(value, number)
            elif not _is_duplicate(message, name):
                yield Piece(("messages", number, name))
    for number, _ in enumerate(conversation.tools or ()):
        yield Piece(("tools", number))


def _pieces_of_calls(calls: Sequence[Mapping[str, Any]], number: int) -> Iterator[Piece]:
    for index, call in enumerate(calls):
        parent_path = ("function",) if isinstance(call.get("function"), dict) else ()
        fields = call["function"] if parent_path else call
        for name, value in fields.items():
            if name != "type" and not is_metadata(name) and has_content(value):
                yield Piece(("messages", number, "tool_calls", index, *parent_path, name))


def _is_duplicate(message: Message, name: str) -> bool:
    """Return whether a field of thoughts repeats one with a name that transformers passes to templates first."""
    before = THOUGHTS[: THOUGHTS.index(name)] if name in THOUGHTS else ()
    return any(message.get(earlier) == message[name] for earlier in before)


def _is_in(marked: Any, probe: str) -> bool:
    """Return whether a marked text is in `probe` as a whole; for any other value, whether one of its marks is."""
    if isinstance(marked, str):
        return marked.strip() in probe
    return any(mark in probe for mark in _marks_in(marked))


def _marks_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from _MARK.findall(value)
    elif isinstance(value, dict):
        for member in value.values():
            yield from _marks_in(member)
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from _marks_in(member)


def _with_marks(value: Any, number: str) -> Any:
    """Return the value with a mark at the end of every text in it, before trailing white space."""
    if isinstance(value, str):
        visible = value.rstrip()
        return f"{visible}{_BEFORE}{number}{_AFTER}{value[len(visible) :]}" if visible else value
    if isinstance(value, dict):  # `type` gets no mark, since templates compare it
        return {name: member if name == "type" else _with_marks(member, number) for name, member in value.items()}
    return [_with_marks(member, number) for member in value] if isinstance(value, (list, tuple)) else value


def _is_unrendered(template: Template, conversation: Conversation, text: str, piece: Piece) -> bool:
    value = _get(conversation, piece.path)
    if not isinstance(value, str):
        return template.try_render(_remove(conversation, piece.path)) == text
    if piece.field == "name" and conversation.messages[piece.message or 0]["role"] in _TOOLS and value in text:
        return False  # the tool call before it names the tool
    words = _has_unrendered_words(template, conversation, text, piece)
    if words is not None:
        return words
    longer = _replace(conversation, {piece: f"{value.rstrip()} and more"})
    return text in (template.try_render(longer), template.try_render(_remove(conversation, piece.path)))


def _has_unrendered_words(template: Template, conversation: Conversation, text: str, piece: Piece) -> bool | None:
    """Return whether any word of a text is not rendered; None if marks change what the template renders, so that it is
    unknown."""
    value = _get(conversation, piece.path)
    numbers = iter(range(len(value) + 1))
    marks: list[str] = []

    def add_mark(word: re.Match[str]) -> str:
        if word[1]:
            return word[0]
        marks.append(f"{_BEFORE}{next(numbers)}{_AFTER}")
        return word[0] + marks[-1]

    probe = template.try_render(_replace(conversation, {piece: _WORDS.sub(add_mark, value)}))
    if probe is None or _MARK.sub("", probe) != text:
        return None
    return not all(mark in probe for mark in marks)


def _get(conversation: Conversation, path: Sequence[str | int]) -> Any:
    value: Any = {"messages": conversation.messages, "tools": conversation.tools}
    for key in path:
        value = value[key]
    return value


def _replace(conversation: Conversation, values: Mapping[Piece, Any]) -> Conversation:
    """Return the conversation with other values for these pieces."""
    tree: Any = {"messages": _copy(conversation.messages), "tools": _copy(conversation.tools)}
    for piece, value in values.items():
        node = tree
        for key in piece.path[:-1]:
            node = node[key]
        node[piece.path[-1]] = value
    return replace(conversation, messages=tuple(tree["messages"]), tools=tree["tools"])


def _remove(conversation: Conversation, path: Sequence[str | int]) -> Conversation:
    """Return the conversation without the value at a path."""
    tree: Any = {"messages": _copy(conversation.messages), "tools": _copy(conversation.tools)}
    node = tree
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return replace(conversation, messages=tuple(tree["messages"]), tools=tree["tools"] or None)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copy(member) for name, member in value.items()}
    return [_copy(member) for member in value] if isinstance(value, (list, tuple)) else value
