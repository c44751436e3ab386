"""Find the text of an answer that the model itself writes: after the generation prompt, through the token at which it stops.

Templates write more than that around an answer. Which tokens are then learned is for `conversations`.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.data.chat.chat_template import Template
from trainer.data.chat.messages import THOUGHTS, Conversation, Message

_NEXT_QUESTION = {"role": "user", "content": "?"}


def closing_token(template: Template, conversation: Conversation, text: str) -> str:
    """Return the special token with which the template closes a conversation that no generation prompt follows, or an empty
    text. Phi-3.5's writes `<|endoftext|>` after the `<|end|>` at which the model stops.

    `text` is the rendered conversation.
    """
    token = next((token for token in template.special_texts if text.endswith(token)), "")
    turns = text.removesuffix(token)
    if not token or not ends_with_special(template, turns):
        return ""
    asked = template.try_render(conversation, add_generation_prompt=True)
    return token if asked is not None and asked.startswith(turns) and not asked.startswith(text) else ""


def ends_with_special(template: Template, text: str) -> bool:
    """Return whether a special token is the last of a text that is not white space."""
    return text.rstrip().endswith(template.special_texts)


def next_special(template: Template, conversation: Conversation, text: str, following: Message | None) -> str:
    """Return the special token that the template writes right after a conversation when another message follows, or an empty
    text. Models of templates without an end of turn, such as GLM-4's, stop at the token of the next role.

    `text` is the rendered conversation, and `following` the message after it; if it is None, a question is taken, unless the
    last message may be a tool call, whose result would follow.
    """
    last = conversation.messages[-1]
    if following is None and set(last) - {"role", "content", *THOUGHTS}:
        return ""
    longer = template.try_render(conversation.followed_by(following or _NEXT_QUESTION))
    if longer is None or not longer.startswith(text):
        return ""
    return next((token for token in template.special_texts if longer.startswith(token, len(text))), "")


def trim_spans(
    template: Template, conversation: Conversation, text: str, spans: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the ranges of generation marks in a rendered conversation without the generation prompt at their beginning, and
    without the white space after a special token at their end. SmolLM3's marks include both."""
    prompt = _generation_prompt(template, conversation)
    return [_trim_span(template, text, start, stop, prompt) for start, stop in spans]


def _generation_prompt(template: Template, conversation: Conversation) -> str:
    """Return the text that the template adds to ask for the first answer; empty if it adds none, or changes the text before."""
    before = conversation.truncated(conversation.answers[0])
    if not before.messages:
        return ""
    without_prompt, with_prompt = (template.try_render(before, add_generation_prompt=add_prompt) for add_prompt in (False, True))
    return (
        with_prompt[len(without_prompt) :]
        if with_prompt is not None and without_prompt is not None and with_prompt.startswith(without_prompt)
        else ""
    )


def _trim_span(template: Template, text: str, start: int, stop: int, prompt: str) -> tuple[int, int]:
    if prompt and not text.endswith(prompt, 0, start):
        begins = (begin for begin in range(max(start - len(prompt), 0), start + 1) if text.startswith(prompt, begin))
        start = next((begin + len(prompt) for begin in begins if begin + len(prompt) <= stop), start)
    end = start + len(text[start:stop].rstrip())
    return start, end if text[start:end].endswith(template.special_texts) else stop
