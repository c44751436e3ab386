"""Generate text for prompts on the model chunks of an open session.

Prompts run one after another, each with its own KV cache. A batch would be faster per token, but rows of different lengths need a
mask that attention with a cache does not take: see `trainer.generation.forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from formats.errors import UserError
from trainer.generation.forward import broadcast_token, inference_mode, new_cache, next_logits
from trainer.generation.sampling import NOT_FINITE, Sampling, sample_token
from trainer.model import unwrap
from trainer.tokenizers import MODEL_CONFIGS, Tokenizer, end_tokens, read_model_config

TextCallback = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Generation:
    """The text generated for a prompt."""

    prompt: str
    text: str
    """The generated text, without the prompt and the end token."""

    tokens: list[int]
    """The token ids of `text`."""

    finished: bool
    """Whether the model generated an end token; else `max_new_tokens` or the model's longest sequence was reached."""


def generate(
    chunks: Sequence[Any],
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    tell: TextCallback | None = None,
) -> list[Generation]:
    """Return the generated text of each prompt, which is a text or token ids. All ranks call this with the same arguments, and
    get the
    same results.

    `chunks` may be wrapped for training; they and all random states are unchanged afterwards. Data-parallel ranks repeat the same
    work. `tell` is called with pieces of text as they are generated, on the calling thread. Raises UserError, on all ranks and
    before the first token, for a prompt that is too long, or empty without a begin token.
    """
    inner, sampling = unwrap(chunks[-1]), sampling or Sampling()
    encoded = [
        _encode_prompt(prompt, number, tokenizer=tokenizer, longest=inner.max_sequence_length, vocabulary=inner.config.vocab_size)
        for number, prompt in enumerate(prompts, start=1)
    ]
    ends = end_tokens(tokenizer)
    generations = []
    with inference_mode(chunks):
        for number, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True)):
            limit = min(max_new_tokens, inner.max_sequence_length - len(tokens))
            stream = _generate_tokens(chunks, tokens, limit=limit, sampling=sampling, number=number)
            text = prompt if isinstance(prompt, str) else tokenizer.decode(tokens)
            generations.append(_collect(text, stream, ends=ends, tokenizer=tokenizer, tell=tell))
    return generations


def _collect(
    prompt: str, stream: Iterator[int], *, ends: frozenset[int], tokenizer: Tokenizer, tell: TextCallback | None
) -> Generation:
    tokens: list[int] = []
    emitted, finished = "", False
    for token in stream:
        finished = token in ends
        if finished:
            break
        tokens.append(token)
        emitted = _emit_new_text(tokenizer.decode(tokens), emitted, tell) if tell else emitted
    text = tokenizer.decode(tokens)
    if tell and text != emitted:
        tell(text.removeprefix(emitted))
    return Generation(prompt, text, tokens, finished)


def _emit_new_text(text: str, emitted: str, tell: TextCallback) -> str:
    """Pass new text to `tell` and return the emitted text; do nothing while the text ends with an incomplete character."""
    if text == emitted or text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(emitted):
        return emitted
    tell(text.removeprefix(emitted))
    return text


def _generate_tokens(
    chunks: Sequence[Any], prompt: Sequence[int], *, limit: int, sampling: Sampling, number: int
) -> Iterator[int]:
    """Yield tokens, the same on all ranks."""
    cache, generator = new_cache(len(prompt) + limit), sampling.generator(number)
    new = list(prompt)
    for _ in range(limit):
        logits = next_logits(chunks, new, cache)
        token = broadcast_token(NOT_FINITE if logits is None else sample_token(logits, sampling, generator))
        if token == NOT_FINITE:
            raise UserError("the model's logits are NaN or Inf", hint="look at the weights, or use `--dtype fp32`")
        yield token
        new = [token]


def _encode_prompt(prompt: str | Sequence[int], number: int, *, tokenizer: Tokenizer, longest: int, vocabulary: int) -> list[int]:
    """Return the tokens of a prompt; those of a text begin with the tokenizer's begin tokens. Raises UserError if they do not
    fit."""
    tokens = encode_text(prompt, tokenizer) if isinstance(prompt, str) else list(prompt)
    if isinstance(prompt, str) and not tokens:
        tokens = _bos_token(tokenizer)
    if not tokens:
        raise UserError(f"prompt {number} is empty, and the tokenizer has no begin token", hint="give a prompt with some text")
    if len(tokens) >= longest:
        raise UserError(
            f"prompt {number} has `{len(tokens)}` tokens, and the model's longest sequence is `{longest}`",
            hint=f"shorten it to {longest - 1} tokens or fewer: generated tokens count too",
        )
    if max(tokens) >= vocabulary:
        raise UserError(
            f"prompt {number} has the token id `{max(tokens)}`, and the model's vocabulary ends at `{vocabulary - 1}`",
            hint="the tokenizer is another model's: name the right one with `tokenizer.tokenizer_model=DIR`",
        )
    return tokens


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a text, with the begin tokens once: chat templates write them too."""
    tokens, begin = tokenizer.encode(text), tokenizer.begin
    return tokens if tuple(tokens[: len(begin)]) == begin else [*begin, *tokens]


def _bos_token(tokenizer: Tokenizer) -> list[int]:
    """Return the `bos_token_id` of the model's config files in a list, or an empty list."""
    for name in MODEL_CONFIGS:
        value = read_model_config(tokenizer, name).get("bos_token_id")
        if isinstance(value, int):
            return [value]
    return []
