"""The tokenizer's chat template, or one from a file, as transformers renders it.

Knows nothing of tokens and of what is learned.
"""

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
_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

_DATE = datetime.date(2024, 7, 26)
"""What templates are told is today: the day that Meta's templates fall back to. With the real one an example's tokens would
change over night, and a resumed run would not go on with what it began."""


@dataclass(frozen=True, slots=True)
class Template:
    """Makes one text of messages."""

    renderer: Any
    """transformers' tokenizer."""

    given: str | None
    """The template from a file; None for the tokenizer's own."""

    controls: frozenset[int]
    """Numbers of tokens that no plain text becomes: what can end a turn."""

    @classmethod
    def load(cls, tokenizer: Tokenizer, file: str | None) -> Template:
        """UserError where there is no template, or the one given cannot be read."""
        if tokenizer.name == "byte":
            raise UserError(
                "the `byte` tokenizer has no chat template, and its texts no tokens that end a turn",
                hint="train on examples of `prompt` and `completion`, or name another tokenizer: `tokenizer.tokenizer_model=DIR`",
            )
        from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

        try:
            found = AutoTokenizer.from_pretrained(tokenizer.name, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # any of many kinds, from several libraries
            raise tokenizers.unreadable(
                f"transformers, which renders chat templates, cannot read `{tokenizer.name}`", Path(tokenizer.name), error
            ) from error
        return cls._checked(tokenizer, found, _read(file) if file else None)

    @classmethod
    def _checked(cls, tokenizer: Tokenizer, found: Any, given: str | None) -> Template:
        if given is None and not (found.chat_template and isinstance(found.chat_template, (str, dict))):
            raise UserError(
                f"the tokenizer in `{tokenizer.name}` has no chat template, and the examples are conversations",
                hint="give a file with one: `dataset.chat_template=FILE`; base models seldom have one, their instruct models do",
            )
        return cls(found, given, frozenset(found.added_tokens_decoder) | frozenset(found.all_special_ids))

    def marks(self, tools: Any) -> bool:
        """Does the template say itself, with `{% generation %}`, what the model is to write?"""
        return bool(_MARK.search(self._text(tools)))

    def names(self, option: str, tools: Any) -> bool:
        """Does the template ask for a variable of that name?"""
        return bool(re.search(rf"\b{re.escape(option)}\b", self._text(tools)))

    def render(self, conversation: Conversation, *, asking: bool) -> str:
        """The text of a conversation; `asking` for an answer, with what stands before one. UnusableError where the template
        refuses it."""
        return self._render(conversation, add_generation_prompt=asking)[0]

    def render_marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where in it the model is to write: first characters, and those after the last."""
        text, spans = self._render(conversation, return_assistant_tokens_mask=True)
        return text, list(spans)

    def _render(self, conversation: Conversation, **how: Any) -> tuple[str, Sequence[tuple[int, int]]]:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError  # noqa: PLC0415 - comes with transformers
        from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415 - slow to import

        template = _on_a_day(self._text(conversation.tools))
        given = {**self.renderer.special_tokens_map, **conversation.options, **how}
        try:
            texts, spans = render_jinja_template(
                [list(conversation.messages)], tools=conversation.tools, chat_template=template, **given
            )
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template is not readable: {fault(error)}", hint="correct the template") from error
        except (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            said = error.message if type(error) is TemplateError else None  # by the template's own `raise_exception`
            raise UnusableError("the chat template refuses it", _first_line(said) or _in_template(error)) from error
        return texts[0], spans[0] if spans else ()

    def _text(self, tools: Any) -> str:
        try:
            return self.renderer.get_chat_template(self.given, tools)
        except ValueError as error:
            raise UserError(
                "the tokenizer has several chat templates, and none is called `default`",
                hint="give one with `dataset.chat_template`",
            ) from error


def _first_line(said: str | None) -> str:
    return (said or "").strip().partition("\n")[0]


def _in_template(error: Exception) -> str:
    """What failed while a template was rendered, and in which of its lines."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f"{fault(error)}{f' in its line {lines[-1]}' if lines else ''}"


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read `dataset.chat_template`, which is `{file}`: {fault(error)}", hint="give a file with a Jinja template"
        ) from error


@cache
def _on_a_day(template: str) -> str:
    """The template with its own idea of today: a macro stands in for the function that transformers offers."""
    if "strftime_now" not in template:
        return template
    days = {form: _DATE.strftime(form) for _, form in _TODAY.findall(template)}
    unknown = "raise_exception('it asks for a date in a form that is not written out')"
    said = f"{{{{ {days}[form] if form in {days} else {unknown} }}}}"
    return f"{{% macro strftime_now(form) %}}{said}{{% endmacro %}}{{{{ '' }}}}{template}"
