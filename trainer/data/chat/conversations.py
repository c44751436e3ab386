"""Conversations: which tokens of a rendered one the model would have written itself. Those are learned, and nothing else.

Knows roles, the template's marks, and how a template's text must grow for its answers to be found. What cannot be told for
certain is an UnusableError, never a guess.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from formats.faults import fault
from trainer.data.chat.drafts import Draft, Tokenized, tokenized
from trainer.data.chat.fields import SAYS_MORE, plain_message
from trainer.data.chat.jinja import Messages, Template
from trainer.data.chat.sources import UnusableError
from trainer.data.documents import is_unicode, names
from trainer.tokenizers import Encoded, Tokenizer

_ANSWERS = "assistant"
_ROLES = {
    "human": "user", "user": "user", "gpt": _ANSWERS, "assistant": _ANSWERS, "system": "system",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
"""Who speaks in ShareGPT's `from`, as templates call them."""

_MARKS_HINT = "mark the answers in the template with `{% generation %}` and `{% endgeneration %}`: `dataset.chat_template=FILE`"


@dataclass(frozen=True, slots=True)
class Conversations:
    """Makes drafts of examples with `messages`.

    Where the template has `{% generation %}` marks, the tokens inside them are learned. Elsewhere an answer is what stands
    between the conversation before it, rendered as when an answer is asked for, and the conversation up to it: of that, the
    tokens up to and including the last special one, which ends the turn; white space that the template writes after it is the
    template's. The tokens of each of these beginnings must be the first tokens of the next.

    No token is added: templates write those that begin and end a text themselves.
    """

    tokenizer: Tokenizer
    template: Template

    def draft(self, fields: Mapping[str, Any], messages: Messages, learned: Sequence[bool]) -> Draft:
        """`learned` says of each message whether it is, if it is an answer. UnusableError for what is no conversation, and where
        the template leaves out something that is said in it."""
        answers = [number for number, one in enumerate(messages) if one["role"] == _ANSWERS]
        wanted = [number for number in answers if learned[number]]
        if not wanted:
            raise UnusableError(
                "none of the assistant's messages is to be learned" if answers else "no message is the assistant's"
            )
        tools = _tools(fields.get("tools"))
        if wanted == answers and self.tokenizer.encode_batch is not None and self.template.marks(tools):
            text, spans = self.template.render_marked(messages, tools=tools)
            draft = Draft([_unicode(text)], partial(_inside, spans))
        else:
            draft = Draft(self._growing(messages, wanted, tools), partial(self._between, wanted))
        self._check_whole(messages, draft.texts[-1], tools)
        return draft

    def _check_whole(self, messages: Messages, text: str, tools: Any) -> None:
        """Is all that is said in the messages in the text, or does the text change with it?"""
        start = 0
        for number, message in enumerate(messages):
            content = (message.get("content") or "").strip()
            found = text.find(content, start) if len(content) > _TELLING else -1
            if found >= 0:
                start = found + len(content)
            elif content and self._without(messages, number, tools, content=f"{content} {_OTHER}") == text:
                raise _left_out(number, f"of `{message['role']}`")
            for name in SAYS_MORE.intersection(message):
                if message[name] and self._without(messages, number, tools, **{name: None}) == text:
                    raise _left_out(number, f"its `{name}`")

    def _without(self, messages: Messages, number: int, tools: Any, **changes: Any) -> str | None:
        """The text where a message is another; None where the template refuses that."""
        try:
            changed = [*messages[:number], {**messages[number], **changes}, *messages[number + 1 :]]
            return self.template.render(changed, tools=tools, asking=False)
        except UnusableError:
            return None

    def _growing(self, messages: Messages, answers: Sequence[int], tools: Any) -> list[str]:
        """Before and after each answer, and the whole."""
        if not answers[0]:
            raise UnusableError("the assistant speaks first", "the template cannot be asked what stands before", hint=_MARKS_HINT)
        render = partial(self.template.render, tools=tools)
        texts = [render(messages[: number + after], asking=not after) for number in answers for after in (0, 1)]
        return [_unicode(text) for text in (*texts, render(messages, asking=False))]

    def _between(self, answers: Sequence[int], texts: Sequence[Encoded]) -> Tokenized:
        ids = [text.ids for text in texts]
        for number, (some, more) in enumerate(pairwise(ids)):
            if more[: len(some)] != some:
                raise _changes(answers[number // 2], after=number % 2)
        trained = np.zeros(len(ids[-1]), bool)
        for number, before, after in zip(answers, ids[:-1:2], ids[1::2], strict=True):
            trained[len(before) : self._end(number, after, len(before))] = True
        return tokenized(ids[-1], trained)

    def _end(self, number: int, ids: Sequence[int], start: int) -> int:
        """Behind the token that ends the turn."""
        found = (place for place in reversed(range(start, len(ids))) if ids[place] in self.template.controls)
        last = next(found, None)
        if last is None or self.tokenizer.decode(ids[last + 1 :]).strip():
            raise UnusableError(
                "the chat template ends the assistant's turn with no special token", f"message {number + 1}", hint=_MARKS_HINT
            )
        return last + 1


def _changes(number: int, *, after: int) -> UnusableError:
    """Two ways to see one thing: the text before an answer is not that with it, or the text with it not that of what follows."""
    reason = "what follows an answer changes its tokens" if after else "an answer changes the tokens before it"
    return UnusableError(f"with this chat template {reason}", f"message {number + 1}", hint=_MARKS_HINT)


def _inside(spans: Sequence[tuple[int, int]], texts: Sequence[Encoded]) -> Tokenized:
    """A token is learned if its characters lie inside a mark; one that lies half inside belongs to nobody."""
    (text,) = texts
    begins, ends = np.array(text.offsets, np.int64).reshape(-1, 2).T
    trained = np.zeros(len(text.ids), bool)
    for start, stop in spans:
        inside = (begins >= start) & (ends <= stop) & (begins < stop)
        if np.any((begins < stop) & (ends > start) & ~inside):
            raise UnusableError(
                "a token lies half inside a generation mark of the chat template",
                f"that from character {start} to {stop}",
                hint="put the marks where tokens begin and end: right behind a special token, say",
            )
        trained |= inside
    return tokenized(text.ids, trained)


_TELLING = 8
"""Letters from which on a message's text is found in another by no accident."""

_OTHER = "and otherwise"


def _left_out(number: int, what: str) -> UnusableError:
    return UnusableError(
        "the chat template leaves out something that is said",
        f"message {number + 1}, {what}",
        hint="take a template that has it (`dataset.chat_template=FILE`), or leave it out of the example",
    )


def messages_of(fields: Mapping[str, Any], name: str) -> tuple[list[Mapping[str, Any]], list[bool]]:
    """The messages in that field, and of each whether it is learned if it is an answer. Roles and texts are checked, ShareGPT's
    `from` and `value` stand under the names that templates know, and parts are one text."""
    value = fields[name]
    if not isinstance(value, list) or not value:
        raise UnusableError(
            f"its `{name}` is no list of messages", f"it is {'empty' if value == [] else f'a {type(value).__name__}'}"
        )
    found = [_message(one, number) for number, one in enumerate(value, 1)]
    return [message for message, _ in found], [learned for _, learned in found]


def _message(found: Any, number: int) -> tuple[Mapping[str, Any], bool]:
    if not isinstance(found, dict):
        raise UnusableError("a message is no object", f"message {number} is a {type(found).__name__}")
    if found.get("role") is None and found.get("from") is not None:
        rest = {name: value for name, value in found.items() if name not in ("from", "value")}
        found = {**rest, "role": _role(found["from"], number), "content": found.get("value")}
    if not isinstance(found.get("role"), str):
        raise UnusableError("a message has no `role`", f"message {number} has {names(found)}")
    found, learned = plain_message(found, number)
    content, more = found.get("content"), SAYS_MORE.intersection(found)
    if content is not None and not isinstance(content, str):
        raise UnusableError("a message's `content` is no text", f"that of message {number} is a {type(content).__name__}")
    said = content or any(found[name] for name in more)
    if content is None and not said:
        raise UnusableError("a message has no `content`", f"message {number} has {names(found)}")
    if found["role"] == _ANSWERS and not said:
        raise UnusableError("an answer is empty", f"message {number}")
    return found, learned


def _role(speaker: Any, number: int) -> str:
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UnusableError("it is not known who speaks", f"`from` of message {number} is `{str(speaker)[:40]}`")
    return role


def _tools(value: Any) -> Any:
    """Many datasets keep them as JSON: tables have no room for schemas that differ."""
    if not isinstance(value, str):
        return value or None
    try:
        return json.loads(value) or None if value.strip() else None
    except ValueError as error:
        raise UnusableError("its `tools` are not JSON", fault(error)) from error


def _unicode(text: str) -> str:
    if not is_unicode(text):
        raise UnusableError("it holds half a surrogate pair, which is no text")
    return text
