"""Tokenize files of examples, and mark the tokens to learn. An example that cannot be used is an error, or counted.

Order is kept; about a hundred examples are in memory at a time. Packing is `packing`'s.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import batched, islice
from pathlib import Path
from typing import Any

from formats.errors import UserError
from trainer.config import FinetuningDatasetConfig
from trainer.data.chat.chat_template import Template
from trainer.data.chat.completions import CompletionRenderer
from trainer.data.chat.conversations import ConversationRenderer
from trainer.data.chat.fields import check_unused_fields, drop_fields, is_metadata, prepend_system
from trainer.data.chat.messages import Conversation, Message, parse_messages, parse_template_kwargs, parse_tools
from trainer.data.chat.sources import Source
from trainer.data.chat.tokenized import RenderedText, Tokenized, encode_texts
from trainer.data.records import Record, UnusableError, list_some
from trainer.tokenizers import Tokenizer

__all__ = ["Counts", "ExampleTokenizer", "Tokenized", "identity", "read_examples", "tokenizer_identity"]

_MESSAGE_HINT = "put it into a message"
_TEMPLATE_HINT = "name it in `dataset.prompt_template`, for example `{system} {prompt}`"
_TEMPLATE_FIELDS = ("tools", "system", "chat_template_kwargs")
_BATCH = 128  # examples that are tokenized together, on all cores


@dataclass(slots=True)
class Counts:
    """The figures of the examples read so far."""

    sequence_length: int = 0
    examples: int = 0
    """Usable examples."""

    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    longest: int = 0
    """The most tokens of an example before truncation."""

    skipped: Counter[str] = field(default_factory=Counter)
    """The number of unusable examples, by reason."""

    files: set[Path] = field(default_factory=set)
    unused: Mapping[str, None] = field(default_factory=dict)
    """Fields of examples that are not used."""

    def add(self, example: Tokenized, *, length: int) -> None:
        """Count an example that had `length` tokens before truncation."""
        self.examples += 1
        self.tokens += len(example.tokens)
        self.trained += int(example.trained.sum())
        self.truncated += length > len(example.tokens)
        self.longest = max(self.longest, length)

    def __str__(self) -> str:
        share = 100 * self.trained / max(self.tokens, 1)
        return (
            f"{_plural(self.examples, 'example')} of {_plural(len(self.files), 'file')}: {_format_tokens(self.tokens)}, "
            f"{share:.1f} % trained on, {self.truncated:,} truncated to {self.sequence_length}, "
            f"{self.skipped.total():,} skipped"
        )

    def reasons(self) -> list[str]:
        """Return a line for each reason to skip examples, most frequent first, and one for unused fields."""
        skipped = [f"skipped {count:,}: {reason}" for reason, count in self.skipped.most_common()]
        return [*skipped, *([f"unused fields: {list_some(self.unused)}"] if self.unused else [])]


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _format_tokens(count: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.1f} {unit} tokens"
    return _plural(count, "token")


def read_examples(
    source: Source, tokenizer: Tokenizer, config: FinetuningDatasetConfig, *, counts: Counts | None = None
) -> Iterator[Tokenized]:
    """Yield the usable examples of a source, in order, truncated to `config.sequence_length` tokens.

    `counts` is updated as they are read. Raises UserError if files or templates cannot be read; for the first unusable example,
    with its location and the reason, unless `config.skip_bad`; and at the end if no example was usable.
    """
    counts = Counts() if counts is None else counts
    counts.sequence_length = config.sequence_length
    example_tokenizer, before = ExampleTokenizer(tokenizer, config), counts.examples
    counts.unused = example_tokenizer.unused
    previous = None
    for records in batched(source.records(), _BATCH):
        for record, result in example_tokenizer.tokenize(records):
            counts.files.add(record.path)
            if isinstance(result, UnusableError):
                _skip(record, result, counts, config)
                continue
            length = config.sequence_length
            example = Tokenized(result.tokens[:length], result.trained[:length], record.location, record is previous)
            previous = record
            counts.add(example, length=len(result.tokens))
            yield example
    if counts.examples == before:
        raise _no_usable_example(source, counts)


def _skip(record: Record, error: UnusableError, counts: Counts, config: FinetuningDatasetConfig) -> None:
    if not config.skip_bad:
        hint = f"{error.hint or 'correct it'}, or leave such examples out: `dataset.skip_bad=true`"
        raise UserError(f"{record.location} cannot be used: {error}", hint=hint) from None
    counts.skipped[error.reason] += 1


def _no_usable_example(source: Source, counts: Counts) -> UserError:
    if not counts.skipped:
        return UserError(f"{source.name} has no examples", hint="name a file that has some: `dataset.path`")
    reasons = "; ".join(f"{count:,}: {reason}" for reason, count in counts.skipped.most_common(3))
    return UserError(f"no example of {source.name} can be used ({reasons})", hint="look at one with `mbtrain preview`")


@dataclass
class ExampleTokenizer:
    """Tokenizes examples by their fields: `messages` or `conversations`, or `prompt` and `completion`."""

    tokenizer: Tokenizer
    config: FinetuningDatasetConfig
    unused: dict[str, None] = field(default_factory=dict)
    """Names of fields that are not used, in the order in which they were seen."""

    @cached_property
    def _conversations(self) -> ConversationRenderer:
        return ConversationRenderer(self.tokenizer, Template.load(self.tokenizer, self.config.chat_template))

    @cached_property
    def _completions(self) -> CompletionRenderer:
        return CompletionRenderer.from_template(self.tokenizer, self.config.prompt_template)

    def tokenize(self, records: Sequence[Record]) -> list[tuple[Record, Tokenized | UnusableError]]:
        """Return the tokens of each example, not truncated, or why it is unusable; a record may give several examples. Raises
        UserError for an error of all examples, such as a template that cannot be read."""
        rendered = [(record, result) for record in records for result in self._render(record)]
        texts = [text for _, result in rendered if isinstance(result, RenderedText) for text in result.texts]
        encoded = iter(encode_texts(self.tokenizer, texts))
        return [
            (record, self._finish_or_error(result, encoded) if isinstance(result, RenderedText) else result)
            for record, result in rendered
        ]

    def _finish_or_error(self, rendered: RenderedText, encoded: Iterator[Any]) -> Tokenized | UnusableError:
        """Return the example made of the next texts of `encoded`, or why it is unusable."""
        texts = list(islice(encoded, len(rendered.texts)))
        try:
            return self._finish(rendered, texts)
        except UnusableError as error:
            return error

    def _render(self, record: Record) -> list[RenderedText | UnusableError]:
        try:
            return [*self._render_fields({name: value for name, value in record.fields().items() if value is not None})]
        except UnusableError as error:
            return [error]

    def _render_fields(self, fields: Mapping[str, Any]) -> list[RenderedText]:
        fields = drop_fields(fields, self.config.ignore_fields)
        present = [name for name in ("messages", "conversations") if name in fields]
        if present:
            messages, learned = self._messages(fields, present[0])
            if present[1:] and self._messages(fields, present[1])[0] != messages:
                raise UnusableError("its `messages` and `conversations` differ", "", hint="leave one of them out")
            return self._render_messages(fields, messages, learned, used=present)
        if "completion" not in fields:
            raise UnusableError("it has neither `messages` nor `completion`", f"it has {list_some(fields)}")
        if isinstance(fields["completion"], list):
            return self._render_prompt_and_completion(fields)
        rendered = self._completions.render(fields)
        self._check_unused_fields(fields, self._completions.fields, rendered.texts, hint=_TEMPLATE_HINT)
        return [rendered]

    def _messages(self, fields: Mapping[str, Any], name: str) -> tuple[list[Message], list[bool]]:
        return parse_messages(fields, name, self.config.ignore_fields)

    def _render_messages(
        self, fields: Mapping[str, Any], messages: list[Message], learned: list[bool], *, used: Sequence[str]
    ) -> list[RenderedText]:
        complete = prepend_system(fields, messages)
        texts = [str(message.get("content") or "") for message in complete]
        self._check_unused_fields(fields, {*used, *_TEMPLATE_FIELDS}, texts, hint=_MESSAGE_HINT)
        self.unused.update(dict.fromkeys(name for message in messages for name in message if is_metadata(name)))
        conversation = Conversation(tuple(complete), parse_tools(fields), parse_template_kwargs(fields))
        return self._conversations.render(
            conversation, [True] * (len(complete) - len(messages)) + learned, learn=self.config.learn
        )

    def _check_unused_fields(self, fields: Mapping[str, Any], used: Collection[str], texts: Sequence[str], *, hint: str) -> None:
        self.unused.update(dict.fromkeys(check_unused_fields(fields, used, texts, hint=hint)))

    def _render_prompt_and_completion(self, fields: Mapping[str, Any]) -> list[RenderedText]:
        """Render a prompt and a completion that are lists of messages, TRL's format; answers in the prompt are not learned."""
        if "prompt" not in fields:
            raise UnusableError("it has no `prompt`", f"it has {list_some(fields)}")
        (prompt, _), (completion, learned) = self._messages(fields, "prompt"), self._messages(fields, "completion")
        return self._render_messages(
            fields, [*prompt, *completion], [False] * len(prompt) + learned, used=("prompt", "completion")
        )

    def _finish(self, rendered: RenderedText, texts: Sequence[Any]) -> Tokenized:
        example = rendered.finish(texts)
        if not len(example.tokens):
            raise UnusableError("it has no tokens")
        if not example.trained.any():
            raise UnusableError("none of its tokens is learned")
        if example.trained.all():
            raise UnusableError("all of its tokens are learned: it has no prompt")
        if not example.trained[1 : self.config.sequence_length].any():
            detail = f"it begins at token {int(example.trained.argmax()) + 1}"
            raise UnusableError(
                "the answer is truncated away entirely", f"{detail}, a sequence has {self.config.sequence_length}"
            )
        return example


def identity(source: Source, tokenizer: Tokenizer, config: FinetuningDatasetConfig) -> dict[str, Any]:
    """Return what the tokens of a source depend on, as plain values: equal if `read_examples` yields the same.

    Files are identified by name, size and modification time; they are not read.
    """
    stats = [(path, path.stat()) for path in source.files()]
    template = Path(config.chat_template).read_bytes() if config.chat_template and Path(config.chat_template).is_file() else b""
    return {
        "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "tokenizer": tokenizer_identity(tokenizer),
        "chat_template": hashlib.sha256(template).hexdigest(),
        "prompt_template": config.prompt_template,
        "learn": config.learn,
        "ignore_fields": sorted(config.ignore_fields),
        "sequence_length": config.sequence_length,
        "skip_bad": config.skip_bad,
    }


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the SHA-256 of each file of a tokenizer, by name."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(tokenizer.files().items())}
