"""Render conversations, and find the tokens that the model itself would write; only those are learned.

Answers are found by the template's generation marks, or by rendering the conversation up to each answer. An ambiguous case raises
UnusableError.
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
from trainer.data.chat.messages import ASSISTANT, TOOL, Conversation
from trainer.data.chat.tokenized import RenderedText, Tokenized, make_tokenized
from trainer.data.records import UnusableError
from trainer.tokenizers import Encoded, Tokenizer

_RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message")
"""Variables of templates that `chat_template_kwargs` may not set."""

_MARKS_HINT = "mark the answers in the template with `{% generation %}` and `{% endgeneration %}`: `dataset.chat_template=FILE`"
_LEARN_HINT = (
    "learn the last answer alone, or each in an example of its own: `dataset.learn=last_answer`, `dataset.learn=each_answer`"
)


@dataclass(frozen=True, slots=True)
class ConversationRenderer:
    """Renders examples with `messages`.

    If the template has `{% generation %}` marks, the tokens inside them are learned. Otherwise the conversation is rendered
    twice for each answer: up to the answer with a generation prompt, and including the answer. The tokens of the difference are
    learned, up to and including the last special token, which ends the turn; white space after it belongs to the template. The
    tokens of each such prefix must be a prefix of the next.

    No tokens are added: templates write the begin and end tokens.
    """

    tokenizer: Tokenizer
    template: Template

    def render(self, conversation: Conversation, learned: Sequence[bool], *, learn: Learned) -> list[RenderedText]:
        """Return the texts of the examples of a conversation.

        `learned` says for each message whether it is learned if it is an answer. `learn` chooses among those answers, and whether
        each is an example of its own that ends with it. Raises UnusableError if there is no answer to learn, or the template does
        not render all content.
        """
        answers = [number for number, message in enumerate(conversation.messages) if message["role"] == ASSISTANT]
        wanted = [number for number in answers if learned[number]]
        if not wanted:
            raise UnusableError("no assistant message is marked as learned" if answers else "it has no assistant message")
        self._check_template_kwargs(conversation)
        conversation = self._fill_contents(conversation)
        if learn == "all_answers":
            return [self._render(conversation, wanted)]
        last = wanted[-1:] if learn == "last_answer" else wanted
        return [self._render(conversation.truncated(number + 1), [number]) for number in last]

    def _fill_contents(self, conversation: Conversation) -> Conversation:
        """Return the conversation with an empty `content` in messages without one, if the template needs it; servers do the same
        for
        tool calls."""
        if all("content" in message for message in conversation.messages):
            return conversation
        filled = replace(conversation, messages=tuple({"content": "", **message} for message in conversation.messages))
        return conversation if self._can_render(conversation) or not self._can_render(filled) else filled

    def _can_render(self, conversation: Conversation) -> bool:
        try:
            self.template.render(conversation, add_generation_prompt=False)
        except UnusableError:
            return False
        return True

    def _check_template_kwargs(self, conversation: Conversation) -> None:
        for name in conversation.template_kwargs:
            if name in _RESERVED:
                raise UnusableError(f"its `chat_template_kwargs` set `{name}`, which is reserved")
            if not self.template.uses_variable(name, conversation.tools):
                raise UnusableError(f"the chat template has no variable `{name}`, which its `chat_template_kwargs` set")

    def _render(self, conversation: Conversation, wanted: Sequence[int]) -> RenderedText:
        every_answer = all(
            number in wanted for number, message in enumerate(conversation.messages) if message["role"] == ASSISTANT
        )
        if every_answer and self.tokenizer.encode_batch is not None and self.template.has_generation_marks(conversation.tools):
            text, spans = self.template.render_marked(conversation)
            rendered = RenderedText([_unicode(text)], partial(_learn_marked, spans))
        else:
            rendered = RenderedText(self._render_prefixes(conversation, wanted), partial(self._learn_between, wanted))
        rewritten = unrendered.check_rendered(self.template, conversation, rendered.texts[-1])
        if list(wanted) == [len(conversation.messages) - 1]:
            rewritten.intersection_update(wanted)  # in generation, the template renders the earlier messages in the same way
        else:
            rewritten = {number for number in rewritten if number in wanted or conversation.messages[number]["role"] == TOOL}
        if rewritten:
            raise _unstable_template(min(rewritten), after=True)
        return rendered

    def _render_prefixes(self, conversation: Conversation, answers: Sequence[int]) -> list[str]:
        """Render the conversation before and after each answer, and as a whole."""
        if not answers[0]:
            raise UnusableError(
                "the first message is the assistant's", "there is no prefix to render before it", hint=_MARKS_HINT
            )
        ends = [(number + after, not after) for number in answers for after in (0, 1)]
        texts = [self.template.render(conversation.truncated(end), add_generation_prompt=asking) for end, asking in ends]
        return [_unicode(text) for text in (*texts, self.template.render(conversation, add_generation_prompt=False))]

    def _learn_between(self, answers: Sequence[int], texts: Sequence[Encoded]) -> Tokenized:
        ids = [text.ids for text in texts]
        for number, (prefix, longer) in enumerate(pairwise(ids)):
            if longer[: len(prefix)] != prefix:
                raise _unstable_template(answers[number // 2], after=number % 2)
        trained = np.zeros(len(ids[-1]), bool)
        for number, before, after in zip(answers, ids[:-1:2], ids[1::2], strict=True):
            trained[len(before) : self._turn_end(number, after, len(before))] = True
        return make_tokenized(ids[-1], trained)

    def _turn_end(self, number: int, ids: Sequence[int], start: int) -> int:
        """Return the index after the special token that ends the turn."""
        special = (index for index in reversed(range(start, len(ids))) if ids[index] in self.template.special_ids)
        last = next(special, None)
        if last is None or self.tokenizer.decode(ids[last + 1 :]).strip():
            raise UnusableError(
                "the chat template does not end the assistant's turn with a special token",
                f"message {number + 1}",
                hint=_MARKS_HINT,
            )
        return last + 1


def _unstable_template(number: int, *, after: int) -> UnusableError:
    """Return the error for prefixes that do not match: before an answer, or (`after`) after it."""
    reason = "what follows an answer changes its tokens" if after else "an answer changes the tokens before it"
    return UnusableError(f"with this chat template {reason}", f"message {number + 1}", hint=_LEARN_HINT if after else _MARKS_HINT)


def _learn_marked(spans: Sequence[tuple[int, int]], texts: Sequence[Encoded]) -> Tokenized:
    """Mark the tokens whose characters are inside a generation mark. Raises UnusableError for a token that is partly inside."""
    (text,) = texts
    begins, ends = np.array(text.offsets, np.int64).reshape(-1, 2).T
    trained = np.zeros(len(text.ids), bool)
    for start, stop in spans:
        inside = (begins >= start) & (ends <= stop) & (begins < stop)
        if np.any((begins < stop) & (ends > start) & ~inside):
            raise UnusableError(
                "a token is partly inside a generation mark of the chat template",
                f"the one from character {start} to {stop}",
                hint="put the marks at token boundaries, for example right after a special token",
            )
        trained |= inside
    return make_tokenized(text.ids, trained)


def _unicode(text: str) -> str:
    if not is_text(text):
        raise UnusableError("it contains an unpaired surrogate, which is not valid text")
    return text
