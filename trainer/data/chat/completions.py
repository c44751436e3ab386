"""Render examples of `prompt` and `completion`: a prompt from a template, and the completion to learn."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.errors import UserError, is_text
from trainer.data.chat.tokenized import RenderedText, Tokenized, make_tokenized
from trainer.data.records import UnusableError, list_some
from trainer.tokenizers import Encoded, Tokenizer


@dataclass(frozen=True, slots=True)
class CompletionRenderer:
    """Renders examples with a `completion`.

    Prompt and completion are tokenized separately and concatenated, so the prompt's tokens are those of generation, whatever the
    completion begins with. The tokenizer's begin tokens come first, and the end-of-document token last. The completion and the
    end-of-document token are learned.
    """

    tokenizer: Tokenizer
    pieces: tuple[tuple[str, str | None], ...]
    """The prompt template: texts, each with the name of the field after it, or None."""

    @classmethod
    def from_template(cls, tokenizer: Tokenizer, prompt_template: str) -> CompletionRenderer:
        """Parse a prompt template, such as `Question: {prompt}`. Raises UserError if it is malformed."""
        return cls(tokenizer, _parse_template(prompt_template))

    @property
    def fields(self) -> set[str]:
        """Return the names of the fields that are used."""
        return {"completion", *(name for _, name in self.pieces if name)}

    def render(self, fields: Mapping[str, Any]) -> RenderedText:
        """Return the texts of an example. Raises UnusableError if it lacks a field of the template or a completion."""
        prompt = "".join(text + (_text(fields, name) if name else "") for text, name in self.pieces)
        completion = _text(fields, "completion")
        if not completion:
            raise UnusableError("its `completion` is empty")
        return RenderedText([prompt, completion], self._finish)

    def _finish(self, texts: Sequence[Encoded]) -> Tokenized:
        prompt, completion = (text.ids for text in texts)
        before = [*self.tokenizer.begin, *prompt]
        tokens = [*before, *completion, self.tokenizer.eod]
        return make_tokenized(tokens, np.arange(len(tokens)) >= len(before))


def _parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    hint = "it is text with field names in braces, such as `Question: {prompt}`; a literal brace is doubled: `{{`"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError("`dataset.prompt_template` is not readable: it has an unmatched brace", hint=hint) from error
    for _, name, form, conversion in parts:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise UserError(f"`dataset.prompt_template` has `{{{name}}}`, which is not a plain field name", hint=hint)
    fields = {name for _, name, _, _ in parts if name}
    if not fields or "completion" in fields:
        fault = "has `{completion}`, which is the answer" if fields else "has no field of the examples"
        raise UserError(f"`dataset.prompt_template` {fault}", hint=hint)
    return tuple((text, name) for text, name, _, _ in parts)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise UnusableError(f"it has no `{name}`", f"it has {list_some(fields)}")
    if not isinstance(value, str):
        raise UnusableError(f"its `{name}` is not text", f"it is a {type(value).__name__}")
    if not is_text(value):
        raise UnusableError(f"its `{name}` contains an unpaired surrogate, which is not valid text")
    return value
