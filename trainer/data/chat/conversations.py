"""Render conversations, and find the tokens that the model itself would write; only those are learned.

Answers are found by the template's generation marks, or by rendering the conversation up to each answer. An ambiguous case raises
UnusableError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from formats.errors import is_text
from trainer.config import Learned
from trainer.data.chat import unrendered
from trainer.data.chat.chat_template import Template
from trainer.data.chat.messages import TOOL, Conversation, Message
from trainer.data.chat.tokenized import RenderedText, Tokenized, make_tokenized
from trainer.data.chat.turns import closing_token, ends_with_special, next_special, trim_spans
from trainer.data.records import UnusableError
from trainer.tokenizers import Encoded, Tokenizer, end_tokens

_RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message")
"""Variables of templates that `chat_template_kwargs` may not set."""

_MARKS_HINT = "mark the answers in the template with `{% generation %}` and `{% endgeneration %}`: `dataset.chat_template=FILE`"
_NO_TURN_END = "the chat template does not end the assistant's turn with a special token"
_SPLIT_HINT = (
    "learn each answer in an example of its own, where prompt and answer are tokenized separately, as in generation: "
    "`dataset.learn=each_answer`"
)
_LEARN_HINT = (
    "learn the last answer alone, or each in an example of its own: `dataset.learn=last_answer`, `dataset.learn=each_answer`"
)


@dataclass(frozen=True, slots=True)
class ConversationRenderer:
    """Renders examples with `messages`.

    If the template has `{% generation %}` marks, the tokens inside them are learned. Otherwise the conversation is rendered
    twice for each answer: up to the answer with a generation prompt, and including the answer. The tokens of the difference are
    learned, up to and including the last special token, which ends the turn; white space after it belongs to the template, and
    so does a token that only closes conversations. The tokens of each such prefix must be a prefix of the next.

    Templates write the begin and end tokens. None is added, but for models that stop at the token of the next role, such as
    GLM-4: that token ends the last answer too.
    """

    tokenizer: Tokenizer
    template: Template

    def render(self, conversation: Conversation, learned: Sequence[bool], *, learn: Learned) -> list[RenderedText]:
        """Return the texts of the examples of a conversation.

        `learned` says for each message whether it is learned if it is an answer. `learn` chooses among those answers, and whether
        each is an example of its own that ends with it. Raises UnusableError if there is no answer to learn, or the template does
        not render all content.
        """
        learned_answers = [number for number in conversation.answers if learned[number]]
        if not learned_answers:
            reason = "no assistant message is marked as learned" if conversation.answers else "it has no assistant message"
            raise UnusableError(reason)
        self._check_template_kwargs(conversation)
        conversation = self._adapt_calls(conversation)
        if learn == "all_answers":
            return [self._render(conversation, learned_answers)]
        chosen = learned_answers[-1:] if learn == "last_answer" else learned_answers
        messages = [*conversation.messages, None]
        return [
            self._render(conversation.truncated(number + 1), [number], following=messages[number + 1], alone=True)
            for number in chosen
        ]

    def _adapt_calls(self, conversation: Conversation) -> Conversation:
        """Return the conversation in the form of tool calls that the template takes: without content, or with null or an empty
        text; arguments as objects, or as JSON texts as in OpenAI's format. The first form that renders is taken."""
        if all("content" in message and "tool_calls" not in message for message in conversation.messages):
            return conversation
        forms = (
            form
            for arguments in (conversation, conversation.with_json_arguments())
            for form in (arguments, arguments.with_contents(None), arguments.with_contents(""))
        )
        return next((form for form in forms if self.template.try_render(form) is not None), conversation)

    def _check_template_kwargs(self, conversation: Conversation) -> None:
        for name in conversation.template_kwargs:
            if name in _RESERVED:
                raise UnusableError(f"its `chat_template_kwargs` set `{name}`, which is reserved")
            if not self.template.uses_variable(name, conversation.tools):
                raise UnusableError(f"the chat template has no variable `{name}`, which its `chat_template_kwargs` set")

    def _render(
        self, conversation: Conversation, answers: Sequence[int], *, following: Message | None = None, alone: bool = False
    ) -> RenderedText:
        """Return the texts of an example. `following` is the message after the conversation; `alone` says that the last answer
        is the only one learned."""
        if self._uses_marks(conversation, answers):
            text, spans = self.template.render_marked(conversation)
            trimmed = trim_spans(self.template, conversation, text, spans)
            rendered = RenderedText([_unicode(text)], partial(_learn_marked, trimmed))
        else:
            text = _unicode(self.template.render(conversation, add_generation_prompt=False))
            rendered = self._render_prefixes(conversation, answers, text, following=following, alone=alone)
        self._check_rendered(conversation, answers, text)
        return rendered

    def _uses_marks(self, conversation: Conversation, answers: Sequence[int]) -> bool:
        """Return whether generation marks are used: marks are around all answers, and need tokens with offsets."""
        if self.tokenizer.encode_batch is None or not self.template.has_generation_marks(conversation.tools):
            return False
        return list(answers) == conversation.answers

    def _check_rendered(self, conversation: Conversation, answers: Sequence[int], text: str) -> None:
        rewritten = unrendered.check_rendered(self.template, conversation, text)
        if list(answers) == [len(conversation.messages) - 1]:
            rewritten.intersection_update(answers)  # in generation, the template renders the earlier messages in the same way
        else:
            rewritten = {number for number in rewritten if number in answers or conversation.messages[number]["role"] == TOOL}
        if rewritten:
            raise _unstable_template(min(rewritten), _LEARN_HINT, after=True)

    def _render_prefixes(
        self, conversation: Conversation, answers: Sequence[int], text: str, *, following: Message | None, alone: bool
    ) -> RenderedText:
        """Render the conversation before and after each answer, and as a whole."""
        if not answers[0]:
            raise UnusableError(
                "the first message is the assistant's", "there is no prefix to render before it", hint=_MARKS_HINT
            )
        messages, closing = [*conversation.messages, following], closing_token(self.template, conversation, text)
        texts, end = [], ""
        for number in answers:
            before = self.template.render(conversation.truncated(number), add_generation_prompt=True)
            asked = conversation.truncated(number + 1)
            after = self.template.render(asked, add_generation_prompt=False).removesuffix(closing)
            end = self._missing_end(asked, after, messages[number + 1])
            texts += [_unicode(before), _unicode(after + end)]
        texts.append(text + end if answers[-1] == len(conversation.messages) - 1 else text)
        if alone and texts[1].startswith(texts[0]):
            return RenderedText([*texts, texts[1][len(texts[0]) :]], partial(self._learn_alone, answers[0]))
        return RenderedText(texts, partial(self._learn_between, answers))

    def _missing_end(self, conversation: Conversation, text: str, following: Message | None) -> str:
        """Return the token at which the model stops, if the template writes it only as the beginning of the next message."""
        if ends_with_special(self.template, text):
            return ""
        token = next_special(self.template, conversation, text, following)
        if not token or token in self._end_texts:
            return token
        raise UnusableError(
            _NO_TURN_END,
            f"after message {len(conversation.messages)} follows `{token}`",
            hint=f"if the model stops at `{token}`, add it to `eos_token_id` in `generation_config.json` beside the tokenizer; "
            f"otherwise {_MARKS_HINT}",
        )

    @property
    def _end_texts(self) -> set[str]:
        return {self.tokenizer.decode([token]) for token in end_tokens(self.tokenizer)}

    def _learn_between(self, answers: Sequence[int], texts: Sequence[Encoded]) -> Tokenized:
        ids = [text.ids for text in texts]
        for number, (prefix, longer) in enumerate(pairwise(ids)):
            if longer[: len(prefix)] != prefix:
                raise self._unstable_tokens(answers[number // 2], prefix, longer, after=number % 2)
        trained = np.zeros(len(ids[-1]), bool)
        for number, before, after in zip(answers, ids[:-1:2], ids[1::2], strict=True):
            trained[len(before) : self._turn_end(number, after, len(before))] = True
        return make_tokenized(ids[-1], trained)

    def _learn_alone(self, number: int, texts: Sequence[Encoded]) -> Tokenized:
        """Learn the last answer, whose text is last in `texts`. If the first token of the answer would contain the end of the
        prompt, the two are tokenized separately: in generation, the prompt's tokens do not depend on the answer."""
        *usual, answer = texts
        prompt, after = usual[0].ids, usual[1].ids
        tokens = [*prompt, *answer.ids]
        if after[: len(prompt)] == prompt or self.tokenizer.decode(tokens) != self.tokenizer.decode(after):
            return self._learn_between([number], usual)
        trained = np.zeros(len(tokens), bool)
        trained[len(prompt) : self._turn_end(number, tokens, len(prompt))] = True
        return make_tokenized(tokens, trained)

    def _unstable_tokens(self, number: int, prefix: Sequence[int], longer: Sequence[int], *, after: int) -> UnusableError:
        if after:
            return _unstable_template(number, _LEARN_HINT, after=after)
        same_text = self.tokenizer.decode(longer).startswith(self.tokenizer.decode(prefix))
        return _unstable_template(number, _SPLIT_HINT if same_text else _MARKS_HINT, after=after)

    def _turn_end(self, number: int, ids: Sequence[int], start: int) -> int:
        """Return the index after the special token that ends the turn."""
        special = (index for index in reversed(range(start, len(ids))) if ids[index] in self.template.special_ids)
        last = next(special, None)
        if last is None or self.tokenizer.decode(ids[last + 1 :]).strip():
            raise UnusableError(_NO_TURN_END, f"message {number + 1}", hint=_MARKS_HINT)
        return last + 1


def _unstable_template(number: int, hint: str, *, after: int) -> UnusableError:
    """Return the error for prefixes that do not match: before an answer, or (`after`) after it."""
    reason = "what follows an answer changes its tokens" if after else "an answer changes the tokens before it"
    return UnusableError(f"with this chat template {reason}", f"message {number + 1}", hint=hint)


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
