"""Render conversations with the tokenizer's chat template, or one from a file, through transformers."""

from __future__ import annotations

import datetime
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from formats.errors import UserError
from formats.faults import fault
from trainer import tokenizers
from trainer.data.chat.messages import Conversation
from trainer.data.records import UnusableError
from trainer.tokenizers import Tokenizer

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STRFTIME_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

_DATE = datetime.date(2024, 7, 26)
"""The date that templates get as today: the default of Meta's templates. With the real date, the tokens of an example would
change from day to day, and a resumed run would see other data."""


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template and the tokenizer that renders it."""

    renderer: Any
    """The tokenizer of transformers."""

    override: str | None
    """The template from a file; None for the tokenizer's."""

    special_ids: frozenset[int]
    """Ids of special tokens, which plain text never becomes and which can end a turn."""

    special_texts: tuple[str, ...]
    """The texts of these tokens, longest first."""

    @classmethod
    def load(cls, tokenizer: Tokenizer, file: str | None) -> Template:
        """Load the template of `file`, or the tokenizer's. Raises UserError if there is none, or it cannot be read."""
        if tokenizer.name == "byte":
            raise UserError(
                "the `byte` tokenizer has no chat template, and no tokens that end a turn",
                hint="train on examples of `prompt` and `completion`, or name another tokenizer: `tokenizer.tokenizer_model=DIR`",
            )
        from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

        try:
            renderer = AutoTokenizer.from_pretrained(tokenizer.name, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # any of many kinds, from several libraries
            raise tokenizers.unreadable(
                f"transformers, which renders chat templates, cannot read `{tokenizer.name}`", Path(tokenizer.name), error
            ) from error
        return cls._checked(tokenizer, renderer, _read(file) if file else None)

    @classmethod
    def _checked(cls, tokenizer: Tokenizer, renderer: Any, override: str | None) -> Template:
        if override is None and not (renderer.chat_template and isinstance(renderer.chat_template, (str, dict))):
            raise UserError(
                f"the tokenizer in `{tokenizer.name}` has no chat template, and the examples are conversations",
                hint="give a file with one: `dataset.chat_template=FILE`; base models seldom have one, their instruct models do",
            )
        ids = frozenset(renderer.added_tokens_decoder) | frozenset(renderer.all_special_ids)
        texts = sorted(renderer.convert_ids_to_tokens(sorted(ids)), key=len, reverse=True)
        return cls(renderer, override, ids, tuple(texts))

    def has_generation_marks(self, tools: Any) -> bool:
        """Return whether the template marks the answers with `{% generation %}`."""
        return bool(_MARK.search(self._source(tools)))

    def uses_variable(self, option: str, tools: Any) -> bool:
        """Return whether the template uses a variable of that name."""
        return bool(re.search(rf"\b{re.escape(option)}\b", self._source(tools)))

    def render(self, conversation: Conversation, *, add_generation_prompt: bool) -> str:
        """Return the text of a conversation, with the generation prompt of an answer at the end if asked. Raises UnusableError
        if the
        template refuses it."""
        return self._render(conversation, add_generation_prompt=add_generation_prompt)[0]

    def try_render(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str | None:
        """Return the rendered text; None if the template refuses the conversation."""
        try:
            return self.render(conversation, add_generation_prompt=add_generation_prompt)
        except UnusableError:
            return None

    def render_marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the character ranges [start, end) of its generation marks."""
        text, spans = self._render(conversation, return_assistant_tokens_mask=True)
        return text, list(spans)

    def _render(self, conversation: Conversation, **options: Any) -> tuple[str, Sequence[tuple[int, int]]]:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError  # noqa: PLC0415 - comes with transformers
        from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415 - slow to import

        template = _with_fixed_date(self._source(conversation.tools))
        variables = {**self.renderer.special_tokens_map, **conversation.template_kwargs, **options}
        try:
            texts, spans = render_jinja_template(
                [list(conversation.messages)], tools=conversation.tools, chat_template=template, **variables
            )
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template is not readable: {fault(error)}", hint="correct the template") from error
        except (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            message = error.message if type(error) is TemplateError else None  # from the template's `raise_exception`
            raise UnusableError("the chat template refuses it", _first_line(message) or _in_template(error)) from error
        return texts[0], spans[0] if spans else ()

    def _source(self, tools: Any) -> str:
        try:
            return self.renderer.get_chat_template(self.override, tools)
        except ValueError as error:
            raise UserError(
                "the tokenizer has several chat templates, and none is named `default`",
                hint="give one with `dataset.chat_template`",
            ) from error


def _first_line(message: str | None) -> str:
    return (message or "").strip().partition("\n")[0]


def _in_template(error: Exception) -> str:
    """Return the kind of error and the line of the template where it was raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f"{fault(error)}{f' in line {lines[-1]}' if lines else ''}"


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read `dataset.chat_template`, which is `{file}`: {fault(error)}", hint="give a file with a Jinja template"
        ) from error


@cache
def _with_fixed_date(template: str) -> str:
    """Return the template with a macro for `strftime_now` that formats `_DATE`, in place of transformers' function."""
    if "strftime_now" not in template:
        return template
    dates = {form: _DATE.strftime(form) for _, form in _STRFTIME_NOW.findall(template)}
    unknown = "raise_exception('it formats a date with a format that is not a literal')"
    value = f"{{{{ {dates}[form] if form in {dates} else {unknown} }}}}"
    return f"{{% macro strftime_now(form) %}}{value}{{% endmacro %}}{{{{ '' }}}}{template}"
