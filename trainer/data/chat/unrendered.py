"""What of a conversation a chat template shows, found by rendering it with and without.

All that is said is marked, rendered once, and looked for in the text; what is not found there is changed or taken out by
itself, and counts as shown if the text is then another. Knows neither tokens nor what is learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.data.chat.chat_template import Template
from trainer.data.chat.fields import has_content, is_about
from trainer.data.chat.messages import ANSWERS, TOOL, Conversation, Message
from trainer.data.records import UnusableError

_BEFORE, _AFTER = "\U00010080", "\U00010081"  # of a mark's number: letters of Linear B, which Python's and JSON's quotes keep
_MARK = re.compile(f"{_BEFORE}\\d+{_AFTER}")
_WORDS = re.compile(r"(<[^<>\s]*>|\[/?[A-Z_]+\])|[^\s<\[]+|[<\[]")
"""Tags, which templates look for, and what is between them."""

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_TOOLS = (TOOL, "function", "ipython")


@dataclass(frozen=True, slots=True)
class Piece:
    """Something that is said: where it is in a conversation, from the outermost key to the innermost."""

    path: tuple[str | int, ...]

    @property
    def message(self) -> int | None:
        """The number of its message, from 0; None for what is in none."""
        return int(self.path[1]) if self.path[0] == "messages" else None

    @property
    def field(self) -> str:
        """The field of the message, or of the example."""
        return str(self.path[2] if self.path[0] == "messages" else self.path[0])


def check(template: Template, conversation: Conversation, text: str) -> set[int]:
    """The numbers of the answers, and of what tools said, that stood otherwise before something followed them, in `talk`, whose
    rendering is `text`: of those a part is left out that the template shows where they are the last message, as Qwen3's leaves
    out thoughts.

    UnusableError, which names it, for all else that is said and not in `text`.
    """
    rewritten = set[int]()
    for piece in left_out(template, conversation, text):
        number = piece.message
        if number is None:
            raise _not_shown(f"its `{piece.field}`", piece.field)
        role = conversation.messages[number]["role"]
        if role not in (ANSWERS, TOOL) or not _was_shown(template, conversation, piece, number):
            what = f"of `{role}`" if piece.field == "content" else f"its `{piece.field}`"
            raise _not_shown(f"message {number + 1}, {what}", piece.field)
        rewritten.add(number)
    return rewritten


def _was_shown(template: Template, conversation: Conversation, piece: Piece, number: int) -> bool:
    """When the message was the last one."""
    if number == len(conversation.messages) - 1:
        return False
    then = conversation.until(number + 1)
    text = _rendered(template, then)
    return text is not None and not _is_left_out(template, then, text, piece)


def _not_shown(what: str, field: str) -> UnusableError:
    ignored = "" if field == "content" else f": `dataset.ignore_fields=[{field}]`"
    return UnusableError(
        "the chat template leaves out something that is said",
        what,
        hint=f"take a template that has it (`dataset.chat_template=FILE`), or leave it out of the example{ignored}",
    )


def left_out(template: Template, conversation: Conversation, text: str) -> list[Piece]:
    """The pieces that are not in `text`."""
    pieces = list(_pieces(conversation))
    marked = {piece: _marked(_at(conversation, piece.path), str(number)) for number, piece in enumerate(pieces)}
    probe = _rendered(template, _with(conversation, marked))
    found = probe is not None and _MARK.sub("", probe) == text
    return [
        piece
        for piece, value in marked.items()
        if not (found and _is_in(value, probe or "")) and _is_left_out(template, conversation, text, piece)
    ]


def _pieces(conversation: Conversation) -> Iterator[Piece]:
    for number, message in enumerate(conversation.messages):
        for name, value in message.items():
            if name == "role" or is_about(name) or not has_content(value):
                continue
            if name == "tool_calls":
                yield from _pieces_of_calls(value, number)
            elif not _is_said_twice(message, name):
                yield Piece(("messages", number, name))
    for number, _ in enumerate(conversation.tools or ()):
        yield Piece(("tools", number))


def _pieces_of_calls(calls: Sequence[Mapping[str, Any]], number: int) -> Iterator[Piece]:
    for place, call in enumerate(calls):
        inside = ("function",) if isinstance(call.get("function"), dict) else ()
        said = call["function"] if inside else call
        for name, value in said.items():
            if name != "type" and not is_about(name) and has_content(value):
                yield Piece(("messages", number, "tool_calls", place, *inside, name))


def _is_said_twice(message: Message, name: str) -> bool:
    """Thoughts under another of their names, which transformers gives to templates before this one."""
    before = _THOUGHTS[: _THOUGHTS.index(name)] if name in _THOUGHTS else ()
    return any(message.get(one) == message[name] for one in before)


def _is_in(marked: Any, probe: str) -> bool:
    """Text must be there as a whole; of anything else, one of its texts."""
    if isinstance(marked, str):
        return marked.strip() in probe
    return any(mark in probe for mark in _marks_in(marked))


def _marks_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from _MARK.findall(value)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _marks_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _marks_in(one)


def _marked(value: Any, number: str) -> Any:
    """With a mark behind every text in it, before the white space that ends the text."""
    if isinstance(value, str):
        shown = value.rstrip()
        return f"{shown}{_BEFORE}{number}{_AFTER}{value[len(shown) :]}" if shown else value
    if isinstance(value, dict):
        return {name: one if name == "type" else _marked(one, number) for name, one in value.items()}  # templates ask for types
    return [_marked(one, number) for one in value] if isinstance(value, (list, tuple)) else value


def _is_left_out(template: Template, conversation: Conversation, text: str, piece: Piece) -> bool:
    value = _at(conversation, piece.path)
    if not isinstance(value, str):
        return _rendered(template, _without(conversation, piece.path)) == text
    if piece.field == "name" and conversation.messages[piece.message or 0]["role"] in _TOOLS and value in text:
        return False  # the call before it has named the tool that answers
    words = _words_left_out(template, conversation, text, piece)
    if words is not None:
        return words
    longer = _with(conversation, {piece: f"{value.rstrip()} and more"})
    return text in (_rendered(template, longer), _rendered(template, _without(conversation, piece.path)))


def _words_left_out(template: Template, conversation: Conversation, text: str, piece: Piece) -> bool | None:
    """Is any word of it not in the text? None where that cannot be told, since marks make the template write something else."""
    value = _at(conversation, piece.path)
    numbers = iter(range(len(value) + 1))
    marks: list[str] = []

    def mark(word: re.Match[str]) -> str:
        if word[1]:
            return word[0]
        marks.append(f"{_BEFORE}{next(numbers)}{_AFTER}")
        return word[0] + marks[-1]

    probe = _rendered(template, _with(conversation, {piece: _WORDS.sub(mark, value)}))
    if probe is None or _MARK.sub("", probe) != text:
        return None
    return not all(one in probe for one in marks)


def _rendered(template: Template, conversation: Conversation) -> str | None:
    """None where the template refuses it."""
    try:
        return template.render(conversation, asking=False)
    except UnusableError:
        return None


def _at(conversation: Conversation, path: Sequence[str | int]) -> Any:
    found: Any = {"messages": conversation.messages, "tools": conversation.tools}
    for key in path:
        found = found[key]
    return found


def _with(conversation: Conversation, values: Mapping[Piece, Any]) -> Conversation:
    """Other values at those places."""
    tree: Any = {"messages": _copied(conversation.messages), "tools": _copied(conversation.tools)}
    for piece, value in values.items():
        inside = tree
        for key in piece.path[:-1]:
            inside = inside[key]
        inside[piece.path[-1]] = value
    return replace(conversation, messages=tuple(tree["messages"]), tools=tree["tools"])


def _without(conversation: Conversation, path: Sequence[str | int]) -> Conversation:
    """Without what is at that place."""
    tree: Any = {"messages": _copied(conversation.messages), "tools": _copied(conversation.tools)}
    inside = tree
    for key in path[:-1]:
        inside = inside[key]
    del inside[path[-1]]
    return replace(conversation, messages=tuple(tree["messages"]), tools=tree["tools"] or None)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(one) for name, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, (list, tuple)) else value
