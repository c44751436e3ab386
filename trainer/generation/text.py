"""Prompts in, text out, on the model chunks of an open session.

Prompts go one after another, each with its own cache of keys and values. A batch would be faster per token, but rows of
different length need a mask that the cache's attention does not take; see `trainer.generation.forward`. Knows no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from formats.errors import UserError
from formats.json_objects import parse_json
from trainer.generation.forward import agreed, inference_mode, new_cache, next_logits
from trainer.generation.sampling import NO_NUMBER, Sampling, choose
from trainer.model import unwrap
from trainer.tokenizers import Tokenizer

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Generation:
    """What followed a prompt."""

    prompt: str
    text: str
    """What was generated, without the prompt and the token that ended it."""

    tokens: list[int]
    """The same as token numbers."""

    finished: bool
    """The model ended it; otherwise `max_new_tokens`, or the longest sequence of the model, was reached."""


def generate(
    chunks: Sequence[Any],
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    tell: Tell | None = None,
) -> list[Generation]:
    """What the model says after each prompt, a text or its tokens. Every rank of a session calls this alike, and gets the same
    answer.

    `chunks` may be wrapped for training; they, and every random state, are left as they were. Copies of the model
    (data-parallel ranks) all do the same work. `tell` is called with pieces of text as they come. Raises UserError, on all
    ranks and before the first token, for a prompt that is too long or empty without a token to begin with.
    """
    shape, how = unwrap(chunks[-1]), sampling or Sampling()
    asked = [
        _encoded(prompt, number, tokenizer=tokenizer, longest=shape.max_sequence_length, vocabulary=shape.config.vocab_size)
        for number, prompt in enumerate(prompts, start=1)
    ]
    ends = _ends(tokenizer)
    answers = []
    with inference_mode(chunks):
        for number, (prompt, tokens) in enumerate(zip(prompts, asked, strict=True)):
            limit = min(max_new_tokens, shape.max_sequence_length - len(tokens))
            stream = _tokens(chunks, tokens, limit=limit, how=how, number=number)
            text = prompt if isinstance(prompt, str) else tokenizer.decode(tokens)
            answers.append(_collect(text, stream, ends=ends, tokenizer=tokenizer, tell=tell))
    return answers


def _collect(prompt: str, stream: Iterator[int], *, ends: frozenset[int], tokenizer: Tokenizer, tell: Tell | None) -> Generation:
    found: list[int] = []
    told, finished = "", False
    for token in stream:
        finished = token in ends
        if finished:
            break
        found.append(token)
        told = _tell_more(tokenizer.decode(found), told, tell) if tell else told
    text = tokenizer.decode(found)
    if tell and text != told:
        tell(text.removeprefix(told))
    return Generation(prompt, text, found, finished)


def _tell_more(text: str, told: str, tell: Tell) -> str:
    """Tell what is new, unless it ends within a character whose other bytes are still to come."""
    if text == told or text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(told):
        return told
    tell(text.removeprefix(told))
    return text


def _tokens(chunks: Sequence[Any], prompt: Sequence[int], *, limit: int, how: Sampling, number: int) -> Iterator[int]:
    """Token after token, the same on all ranks."""
    cache, draws = new_cache(len(prompt) + limit), how.generator(number)
    new = list(prompt)
    for _ in range(limit):
        logits = next_logits(chunks, new, cache)
        token = agreed(NO_NUMBER if logits is None else choose(logits, how, draws))
        if token == NO_NUMBER:
            raise UserError("the model's logits are NaN or Inf", hint="look at the weights, or use `--dtype fp32`")
        yield token
        new = [token]


def _encoded(prompt: str | Sequence[int], number: int, *, tokenizer: Tokenizer, longest: int, vocabulary: int) -> list[int]:
    """A prompt's tokens, after those that the tokenizer begins every text with."""
    tokens = list(prompt) if not isinstance(prompt, str) else [*tokenizer.begin, *tokenizer.encode(prompt)] or _begin(tokenizer)
    if not tokens:
        raise UserError(
            f"prompt {number} is empty, and the tokenizer has no token that begins a text", hint="give the text some words"
        )
    if len(tokens) >= longest:
        raise UserError(
            f"prompt {number} has `{len(tokens)}` tokens, and the model's longest sequence is `{longest}`",
            hint=f"shorten it to {longest - 1} tokens or fewer: what is generated counts too",
        )
    if max(tokens) >= vocabulary:
        raise UserError(
            f"prompt {number} has token `{max(tokens)}`, and the model's vocabulary ends at `{vocabulary - 1}`",
            hint="the tokenizer is another model's: name the right one with `tokenizer.tokenizer_model=DIR`",
        )
    return tokens


def _begin(tokenizer: Tokenizer) -> list[int]:
    """The token that begins a text where there is nothing else, as the model's files name it."""
    for name in _CONFIGS:
        value = _document(tokenizer, name).get("bos_token_id")
        if isinstance(value, int):
            return [value]
    return []


def _ends(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokenizer's end of a document, and whatever else the model's files call an end: that of a turn, say."""
    told = _document(tokenizer, _CONFIGS[0]).get("eos_token_id")
    return frozenset((tokenizer.eod, *(told if isinstance(told, list) else [] if told is None else [told])))


_CONFIGS = ("generation_config.json", "config.json")


def _document(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    data = tokenizer.files().get(name)
    return parse_json(data, source=name) if data else {}
