"""How many rows of a padded vocabulary are tokens, where a checkpoint says only how many rows there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from converter.run_config import UnknownModelError
from formats.errors import format_untrusted
from formats.folder import Folder
from formats.json_objects import read_json
from formats.spec import is_size

TOKENIZER = "tokenizer.json"
DIVISIBLE_BY = 128
"""Megatron-LM's default of `make_vocab_size_divisible_by`."""


def tokens(settings: Mapping[str, Any], tokenizer: Folder, *, origin: str) -> tuple[Any, str]:
    """Return the vocabulary's size without padding, and a note on where it is from; by Megatron-LM's rule of padding, from the
    tokenizer beside the checkpoint. UnknownModelError where nothing says it.

    None where the settings say nothing of a vocabulary at all.
    """
    padded = settings.get("padded_vocab_size")
    if padded is None:
        return None, ""
    multiple = _multiple(settings)
    if multiple == 1 and settings.get("make_vocab_size_divisible_by") == 1:
        return padded, ""
    size = tokenizer_size(tokenizer)
    if size is None:
        raise _unknown(
            f"{origin} say `padded_vocab_size` `{format_untrusted(padded)}`, and not how many of these rows are tokens"
        )
    if padded not in (size, rows_of(size, settings)):
        raise _unknown(
            f"{origin} say `padded_vocab_size` `{format_untrusted(padded)}`, and the tokenizer's {size} tokens, padded "
            "to a multiple of "
            f"{multiple}, would be {rows_of(size, settings)}"
        )
    return size, f"`vocab_size` is {size}, as `{TOKENIZER}` says: {origin} know only the padded size, {format_untrusted(padded)}"


def rows_of(size: int, settings: Mapping[str, Any]) -> int:
    """Return how many rows a vocabulary has with padding, by Megatron-LM's rule."""
    multiple = _multiple(settings)
    return -(-size // multiple) * multiple


def _unknown(message: str) -> UnknownModelError:
    return UnknownModelError(
        message,
        hint="padding must not become tokens: give a folder with the model's `config.json`, whose `vocab_size` is without "
        "padding: `--hf-config DIR`",
    )


def _multiple(settings: Mapping[str, Any]) -> int:
    """What Megatron-LM pads a vocabulary to a multiple of."""
    return divisible_by(settings) * _positive(settings, "tensor_model_parallel_size", 1)


def divisible_by(settings: Mapping[str, Any]) -> int:
    """Return what one rank's rows are padded to a multiple of."""
    return _positive(settings, "make_vocab_size_divisible_by", DIVISIBLE_BY)


def _positive(settings: Mapping[str, Any], name: str, default: int) -> int:
    size = settings.get(name)
    return size if is_size(size) and size else default


def tokenizer_size(folder: Folder) -> int | None:
    """Return how many tokens a `tokenizer.json` has: one more than the largest number; None where there is none."""
    if not folder.has(TOKENIZER):
        return None
    return max(_numbers(read_json(folder, TOKENIZER)), default=-1) + 1 or None


def _numbers(tokenizer: Mapping[str, Any]) -> Iterator[int]:
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocab = cast("Mapping[str, Any]", model).get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        yield from (number for number in cast("dict[str, Any]", vocab).values() if isinstance(number, int))
    elif isinstance(vocab, list):
        yield len(cast("list[Any]", vocab)) - 1
    for token in cast("list[Any]", added) if isinstance(added, list) else []:
        number = cast("Mapping[str, Any]", token).get("id") if isinstance(token, dict) else None
        if isinstance(number, int):
            yield number
