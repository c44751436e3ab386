"""Conversations: which tokens of a rendered one the model would have written itself. Those are learned, and nothing else.

Knows roles, the template's marks, and how a template's text must grow for its answers to be found. What cannot be told for
certain is an UnusableError, never a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np

from formats.errors import is_text
from trainer.config import Learned
from trainer.data.chat import unrendered
from trainer.data.chat.chat_template import Template
from trainer.data.chat.messages import ANSWERS, TOOL, Conversation
from trainer.data.chat.tokenized import RenderedText, Tokenized, tokenized
from trainer.data.records import UnusableError
from trainer.tokenizers import Encoded, Tokenizer

_OURS = ("messages", "tools", "add_generation_prompt", "continue_final_message")
"""What templates are given that no example chooses by these names."""

_MARKS_HINT = "mark the answers in the template with `{% generation %}` and `{% endgeneration %}`: `dataset.chat_template=FILE`"
_LEARN_HINT = (
    "learn the last answer alone, or each in an example of its own: `dataset.learn=last_answer`, `dataset.learn=each_answer`"
)


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

    def drafts(self, conversation: Conversation, learned: Sequence[bool], *, learn: Learned) -> list[RenderedText]:
        """`learned` says of each message whether it is, if it is an answer; `learn`, which of those are, and whether in examples
        of their own, which end with the answer. UnusableError for what is no conversation, and where the template leaves out
        something that is said in it."""
        answers = [number for number, one in enumerate(conversation.messages) if one["role"] == ANSWERS]
        wanted = [number for number in answers if learned[number]]
        if not wanted:
            raise UnusableError(
                "none of the assistant's messages is to be learned" if answers else "no message is the assistant's"
            )
        self._check_options(conversation)
        conversation = self._with_contents(conversation)
        if learn == "all_answers":
            return [self._draft(conversation, wanted)]
        alone = wanted[-1:] if learn == "last_answer" else wanted
        return [self._draft(conversation.until(number + 1), [number]) for number in alone]

    def _with_contents(self, conversation: Conversation) -> Conversation:
        """With empty texts where a call of a tool has none, if the template asks for texts: so do servers that render it."""
        if all("content" in one for one in conversation.messages):
            return conversation
        filled = replace(conversation, messages=tuple({"content": "", **one} for one in conversation.messages))
        return conversation if self._is_rendered(conversation) or not self._is_rendered(filled) else filled

    def _is_rendered(self, conversation: Conversation) -> bool:
        try:
            self.template.render(conversation, asking=False)
        except UnusableError:
            return False
        return True

    def _check_options(self, conversation: Conversation) -> None:
        for name in conversation.options:
            if name in _OURS:
                raise UnusableError(f"its `chat_template_kwargs` give `{name}`, which is said elsewhere")
            if not self.template.names(name, conversation.tools):
                raise UnusableError(f"the chat template has no `{name}`, which its `chat_template_kwargs` give")

    def _draft(self, conversation: Conversation, wanted: Sequence[int]) -> RenderedText:
        all_of_them = all(number in wanted for number, one in enumerate(conversation.messages) if one["role"] == ANSWERS)
        if all_of_them and self.tokenizer.encode_batch is not None and self.template.marks(conversation.tools):
            text, spans = self.template.render_marked(conversation)
            draft = RenderedText([_unicode(text)], partial(_inside, spans))
        else:
            draft = RenderedText(self._growing(conversation, wanted), partial(self._between, wanted))
        rewritten = unrendered.check(self.template, conversation, draft.texts[-1])
        if list(wanted) == [len(conversation.messages) - 1]:
            rewritten.intersection_update(wanted)  # what comes before is as the model would see it
        else:
            rewritten = {number for number in rewritten if number in wanted or conversation.messages[number]["role"] == TOOL}
        if rewritten:
            raise _changes(min(rewritten), after=True)
        return draft

    def _growing(self, conversation: Conversation, answers: Sequence[int]) -> list[str]:
        """Before and after each answer, and the whole."""
        if not answers[0]:
            raise UnusableError("the assistant speaks first", "the template cannot be asked what stands before", hint=_MARKS_HINT)
        ends = [(number + after, not after) for number in answers for after in (0, 1)]
        texts = [self.template.render(conversation.until(end), asking=asking) for end, asking in ends]
        return [_unicode(text) for text in (*texts, self.template.render(conversation, asking=False))]

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
    return UnusableError(f"with this chat template {reason}", f"message {number + 1}", hint=_LEARN_HINT if after else _MARKS_HINT)


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


def _unicode(text: str) -> str:
    if not is_text(text):
        raise UnusableError("it holds half a surrogate pair, which is no text")
    return text
