"""From files of examples to tokens, and for each token whether it is learned; what cannot be used is an error, or counted.

Reads in order and gives in order; keeps some hundred examples in memory. Knows nothing of sequences that hold several.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import batched
from pathlib import Path
from typing import Any

from formats.errors import UserError
from trainer.config import FinetuningDatasetConfig
from trainer.data.chat.chat_template import Template
from trainer.data.chat.completions import Completions
from trainer.data.chat.conversations import Conversations
from trainer.data.chat.fields import check_example, is_about, with_system, without
from trainer.data.chat.messages import Conversation, Message, messages_of, options_of, tools_of
from trainer.data.chat.sources import Source
from trainer.data.chat.tokenized import RenderedText, Tokenized, encode
from trainer.data.records import Record, UnusableError, names
from trainer.tokenizers import Tokenizer

__all__ = ["Counts", "Tokenized", "Writer", "identity", "read_examples", "tokenizer_identity"]

_SAY_IT = "say it in a message"
_NAME_IT = "name it in `dataset.prompt_template`, for example `{system} {prompt}`"
_FOR_TEMPLATES = ("tools", "system", "chat_template_kwargs")
_TOGETHER = 128  # examples that are tokenized at a time, on all cores


@dataclass(slots=True)
class Counts:
    """What was read so far."""

    sequence_length: int = 0
    examples: int = 0
    """Those that can be used."""

    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    longest: int = 0
    """The most tokens of an example, before it was cut."""

    skipped: Counter[str] = field(default_factory=Counter)
    """Examples that cannot be used, by reason."""

    files: set[Path] = field(default_factory=set)
    unused: Mapping[str, None] = field(default_factory=dict)
    """Fields of examples of which nothing is learned."""

    def add(self, example: Tokenized, *, length: int) -> None:
        """An example that had `length` tokens before it was cut."""
        self.examples += 1
        self.tokens += len(example.tokens)
        self.trained += int(example.trained.sum())
        self.truncated += length > len(example.tokens)
        self.longest = max(self.longest, length)

    def __str__(self) -> str:
        share = 100 * self.trained / max(self.tokens, 1)
        return (
            f"{_number(self.examples, 'example')} of {_number(len(self.files), 'file')}: {_tokens(self.tokens)}, "
            f"{share:.1f} % trained on, {self.truncated:,} truncated to {self.sequence_length}, "
            f"{self.skipped.total():,} skipped"
        )

    def reasons(self) -> list[str]:
        """Why examples were skipped, the most frequent reason first; then which of their fields are not used."""
        skipped = [f"skipped {count:,}: {reason}" for reason, count in self.skipped.most_common()]
        return [*skipped, *([f"not learned from: {names(self.unused)}"] if self.unused else [])]


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _tokens(count: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.1f} {unit} tokens"
    return _number(count, "token")


def read_examples(
    source: Source, tokenizer: Tokenizer, config: FinetuningDatasetConfig, *, counts: Counts | None = None
) -> Iterator[Tokenized]:
    """The examples of a source that can be used, in order, cut to `config.sequence_length` tokens.

    `counts` grows as they are read. UserError where files or templates cannot be read; at the first example that cannot be
    used, with its file, its line and the reason, unless `config.skip_bad`; and at the end where none could be used.
    """
    counts = Counts() if counts is None else counts
    counts.sequence_length = config.sequence_length
    writer, before = Writer(tokenizer, config), counts.examples
    counts.unused = writer.unused
    last = None
    for records in batched(source.records(), _TOGETHER):
        for record, made in writer.write(records):
            counts.files.add(record.path)
            if isinstance(made, UnusableError):
                _skip(record, made, counts, config)
                continue
            length = config.sequence_length
            short = Tokenized(made.tokens[:length], made.trained[:length], record.place, record is last)
            last = record
            counts.add(short, length=len(made.tokens))
            yield short
    if counts.examples == before:
        raise _nothing(source, counts)


def _skip(record: Record, why: UnusableError, counts: Counts, config: FinetuningDatasetConfig) -> None:
    if not config.skip_bad:
        way_out = "or leave such examples out: `dataset.skip_bad=true`"
        raise UserError(f"{record.place} cannot be learned from: {why}", hint=f"{why.hint or 'correct it'}, {way_out}") from None
    counts.skipped[why.reason] += 1


def _nothing(source: Source, counts: Counts) -> UserError:
    if not counts.skipped:
        return UserError(f"{source.name} holds no examples", hint="name a file that has some: `dataset.path`")
    reasons = "; ".join(f"{count:,}: {reason}" for reason, count in counts.skipped.most_common(3))
    return UserError(f"no example of {source.name} can be learned from ({reasons})", hint="look at one with `mbtrain preview`")


@dataclass
class Writer:
    """Makes tokens of examples by what they hold: `messages` or `conversations`, or `prompt` and `completion`."""

    tokenizer: Tokenizer
    config: FinetuningDatasetConfig
    unused: dict[str, None] = field(default_factory=dict)
    """Fields of examples that say nothing to learn, in the order in which they were met."""

    @cached_property
    def _conversations(self) -> Conversations:
        return Conversations(self.tokenizer, Template.load(self.tokenizer, self.config.chat_template))

    @cached_property
    def _completions(self) -> Completions:
        return Completions.make(self.tokenizer, self.config.prompt_template)

    def write(self, records: Sequence[Record]) -> list[tuple[Record, Tokenized | UnusableError]]:
        """For each example, or each that is made of it, its tokens, uncut, or why it cannot be used. UserError for what is wrong
        with all of them."""
        drafts = [(record, one) for record in records for one in self._drafts(record)]
        encoded = iter(encode(self.tokenizer, [text for _, one in drafts if isinstance(one, RenderedText) for text in one.texts]))
        return [
            (record, _caught(self._finished, one, [next(encoded) for _ in one.texts]) if isinstance(one, RenderedText) else one)
            for record, one in drafts
        ]

    def _drafts(self, record: Record) -> list[RenderedText | UnusableError]:
        try:
            return [*self._of_fields({name: value for name, value in record.fields().items() if value is not None})]
        except UnusableError as error:
            return [error]

    def _of_fields(self, fields: Mapping[str, Any]) -> list[RenderedText]:
        fields = without(fields, self.config.ignore_fields)
        there = [name for name in ("messages", "conversations") if name in fields]
        if there:
            messages, learned = self._messages(fields, there[0])
            if there[1:] and self._messages(fields, there[1])[0] != messages:
                raise UnusableError("its `messages` and `conversations` differ", "", hint="leave one of them out")
            return self._reporter(fields, messages, learned, used=there)
        if "completion" not in fields:
            raise UnusableError("it has neither `messages` nor `completion`", f"it has {names(fields)}")
        if isinstance(fields["completion"], list):
            return self._continued(fields)
        draft = self._completions.draft(fields)
        self._look_for_more(fields, self._completions.names, draft.texts, hint=_NAME_IT)
        return [draft]

    def _messages(self, fields: Mapping[str, Any], name: str) -> tuple[list[Message], list[bool]]:
        return messages_of(fields, name, self.config.ignore_fields)

    def _reporter(
        self, fields: Mapping[str, Any], messages: list[Message], learned: list[bool], *, used: Sequence[str]
    ) -> list[RenderedText]:
        whole = with_system(fields, messages)
        texts = [str(one.get("content") or "") for one in whole]
        self._look_for_more(fields, {*used, *_FOR_TEMPLATES}, texts, hint=_SAY_IT)
        self.unused.update(dict.fromkeys(name for one in messages for name in one if is_about(name)))
        conversation = Conversation(tuple(whole), tools_of(fields), options_of(fields))
        return self._conversations.drafts(conversation, [True] * (len(whole) - len(messages)) + learned, learn=self.config.learn)

    def _look_for_more(self, fields: Mapping[str, Any], used: Collection[str], texts: Sequence[str], *, hint: str) -> None:
        self.unused.update(dict.fromkeys(check_example(fields, used, texts, hint=hint)))

    def _continued(self, fields: Mapping[str, Any]) -> list[RenderedText]:
        """Prompt and completion as messages, as TRL has them: answers in the prompt are not learned."""
        if "prompt" not in fields:
            raise UnusableError("it has no `prompt`", f"it has {names(fields)}")
        (prompt, _), (completion, learned) = self._messages(fields, "prompt"), self._messages(fields, "completion")
        return self._reporter(fields, [*prompt, *completion], [False] * len(prompt) + learned, used=("prompt", "completion"))

    def _finished(self, draft: RenderedText, texts: Sequence[Any]) -> Tokenized:
        made = draft.finish(texts)
        if not len(made.tokens):
            raise UnusableError("it has no tokens")
        if not made.trained.any():
            raise UnusableError("nothing in it is learned")
        if made.trained.all():
            raise UnusableError("everything in it is learned: nothing asks for the answer")
        if not made.trained[1 : self.config.sequence_length].any():
            detail = f"it begins at token {int(made.trained.argmax()) + 1}"
            raise UnusableError(
                "the answer is truncated away entirely", f"{detail}, a sequence has {self.config.sequence_length}"
            )
        return made


def _caught[**P, T](make: Any, *given: Any) -> Any:
    try:
        return make(*given)
    except UnusableError as error:
        return error


def identity(source: Source, tokenizer: Tokenizer, config: FinetuningDatasetConfig) -> dict[str, Any]:
    """What the tokens of a source depend on, as plain values: equal where `read_examples` gives the same.

    Files count by name, size and time of last change: they are not read.
    """
    stats = [(path, path.stat()) for path in source.files()]
    chat = Path(config.chat_template).read_bytes() if config.chat_template and Path(config.chat_template).is_file() else b""
    return {
        "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "tokenizer": tokenizer_identity(tokenizer),
        "chat_template": hashlib.sha256(chat).hexdigest(),
        "prompt_template": config.prompt_template,
        "learn": config.learn,
        "ignore_fields": sorted(config.ignore_fields),
        "sequence_length": config.sequence_length,
        "skip_bad": config.skip_bad,
    }


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, str]:
    """The sha256 of each file that makes a tokenizer, by name."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(tokenizer.files().items())}
