"""Prompts and completions: what the model is shown, and what it learns to answer. Knows the prompt's template and no roles."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.errors import UserError, is_text
from trainer.data.chat.tokenized import RenderedText, Tokenized, tokenized
from trainer.data.records import UnusableError, names
from trainer.tokenizers import Encoded, Tokenizer


@dataclass(frozen=True, slots=True)
class Completions:
    """Makes drafts of examples with a `completion`.

    Prompt and completion are tokenized each by itself, and their tokens put one after the other: so the prompt's tokens are
    exactly those that the model is given when it is to answer, whatever the completion begins with. Before them stand the
    tokens that the tokenizer begins every text with, after them the one that ends a document. The completion and that last
    token are learned.
    """

    tokenizer: Tokenizer
    pieces: tuple[tuple[str, str | None], ...]
    """The prompt's template: texts, each with the name of the field that follows it, or None."""

    @classmethod
    def make(cls, tokenizer: Tokenizer, prompt_template: str) -> Completions:
        """UserError for a template that is none."""
        return cls(tokenizer, _parsed(prompt_template))

    @property
    def names(self) -> set[str]:
        """The fields that are used."""
        return {"completion", *(name for _, name in self.pieces if name)}

    def draft(self, fields: Mapping[str, Any]) -> RenderedText:
        """UnusableError for an example without what the template names, or without a completion."""
        prompt = "".join(text + (_text(fields, name) if name else "") for text, name in self.pieces)
        completion = _text(fields, "completion")
        if not completion:
            raise UnusableError("its `completion` is empty")
        return RenderedText([prompt, completion], self._finish)

    def _finish(self, texts: Sequence[Encoded]) -> Tokenized:
        prompt, completion = (text.ids for text in texts)
        before = [*self.tokenizer.begin, *prompt]
        tokens = [*before, *completion, self.tokenizer.eod]
        return tokenized(tokens, np.arange(len(tokens)) >= len(before))


def _parsed(template: str) -> tuple[tuple[str, str | None], ...]:
    hint = "it is text with fields of the examples in braces, as `Question: {prompt}`; braces themselves are doubled: `{{`"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError("`dataset.prompt_template` is not readable: a brace is not closed, or not opened", hint=hint) from error
    for _, name, form, conversion in parts:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise UserError(f"`dataset.prompt_template` has `{{{name}}}`, which is no field's name alone", hint=hint)
    fields = {name for _, name, _, _ in parts if name}
    if not fields or "completion" in fields:
        what = "names `{completion}`, which is the answer" if fields else "names no field of the examples"
        raise UserError(f"`dataset.prompt_template` {what}", hint=hint)
    return tuple((text, name) for text, name, _, _ in parts)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise UnusableError(f"it has no `{name}`", f"it has {names(fields)}")
    if not isinstance(value, str):
        raise UnusableError(f"its `{name}` is no text", f"it is a {type(value).__name__}")
    if not is_text(value):
        raise UnusableError(f"its `{name}` holds half a surrogate pair, which is no text")
    return value
