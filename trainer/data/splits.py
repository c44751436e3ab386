"""Build the train, validation and test datasets of a `DatasetConfig`: blends of `.bin`/`.idx` pairs, or mock data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix, parse_and_normalize_split
from megatron.core.datasets.utils import Split, get_blend_from_list

from formats.errors import UserError
from trainer.config import DatasetConfig
from trainer.data import cache
from trainer.data.blend import Blend
from trainer.data.epochs import Epochs, TooFewSamplesError
from trainer.data.interface import HeldOut, Splits
from trainer.data.mock import Mock
from trainer.tokenizers import Tokenizer

_WHOLE = (0.0, 1.0)
_EVALUATION = {Split.valid: "validation", Split.test: "final test"}


def build(config: DatasetConfig, *, tokenizer: Tokenizer | None, vocab_size: int, samples: tuple[int, int, int]) -> Splits:
    """Return the datasets as `trainer.data.build` does. Samples beyond one epoch repeat the data in another order."""
    _check(config, tokenizer)
    blends, shares = _blends(config), _shares(config)
    eod = None if tokenizer is None else tokenizer.eod

    def open_split(split: Split) -> Any:
        number = split.value
        if not samples[number]:
            return None
        if blends is None:
            length, seed = config.sequence_length, config.random_seed
            return Mock(samples=samples[number], sequence_length=length, vocab_size=vocab_size, seed=seed, split=number)
        blend, share = blends[number], shares[number]
        if not blend or share is None:
            return _no_documents(split, config)
        try:
            return _open_blend(blend, config, samples[number], split=split, share=share, eod=eod, vocab_size=vocab_size)
        except TooFewSamplesError as error:
            return _without(split, config, error)

    return cache.first_rank_first(lambda: (open_split(Split.train), open_split(Split.valid), open_split(Split.test)))


def _no_documents(split: Split, config: DatasetConfig) -> None:
    """Return None for validation or test. Raises UserError for training."""
    if split is Split.train:
        field = "dataset.blend_per_split" if config.blend_per_split else "dataset.split"
        raise UserError(f"`{field}` leaves nothing to train on", hint="its first entry is for training")


def _without(split: Split, config: DatasetConfig, error: TooFewSamplesError) -> None:
    """Print a note and return None if the default shares leave too little for validation or test; else raise the error."""
    if split is Split.train or config.blend_per_split or config.split != DatasetConfig.split:
        raise error
    if not dist.is_initialized() or dist.get_rank() == 0:
        click.echo(f"note: there is no {_EVALUATION[split]}: {error.args[0]}", err=True)


def _open_blend(blend: list[Any], config: DatasetConfig, samples: int, **of: Any) -> HeldOut:
    prefixes, weights = _weighted(blend)
    sources = [Epochs(prefix, config, **of) for prefix in prefixes]
    if len(sources) == 1:
        return sources[0].take(samples)
    if config.multiple_validation_sets and of["split"] is not Split.train:
        return {prefix: source.take(samples) for prefix, source in zip(prefixes, sources, strict=True)}
    folder = Path(config.path_to_cache or f"{prefixes[0]}.cache")
    return Blend(sources, weights or [float(source.per_epoch) for source in sources], samples=samples, folder=folder)


def _weighted(blend: list[Any]) -> tuple[list[str], list[float] | None]:
    """Return the prefixes, and the weights if the blend has any; without weights, each prefix counts by its samples."""
    prefixes, weights = get_blend_from_list([str(entry) for entry in blend])
    numbers = any(isinstance(entry, (int, float)) for entry in blend)
    if (numbers and weights is None) or any(not 0 < weight < math.inf for weight in weights or ()):
        raise UserError(
            f"`{blend}` is not a blend",
            hint="it is a list of prefixes, or positive weights and prefixes alternating: `[0.3, a, 0.7, b]`",
        )
    return prefixes, weights


def _blends(config: DatasetConfig) -> Sequence[list[Any] | None] | None:
    """Return the blend of each split; None for mock data."""
    if config.blend_per_split:
        return config.blend_per_split
    return [config.blend] * len(Split) if config.blend else None


def _shares(config: DatasetConfig) -> list[tuple[float, float] | None]:
    """Return for each split its range of the documents, as fractions."""
    if config.blend_per_split:
        return [_WHOLE] * len(Split)
    return convert_split_vector_to_split_matrix(parse_and_normalize_split(config.split))


def _check(config: DatasetConfig, tokenizer: Tokenizer | None) -> None:
    if config.blend == []:
        raise UserError("`dataset.blend` is `[]`", hint="name prefixes of `.bin` and `.idx` files, or leave it out for mock data")
    if config.blend and config.blend_per_split:
        raise UserError("`dataset.blend` and `dataset.blend_per_split` are both set", hint="use one of them")
    if config.blend_per_split and len(config.blend_per_split) != len(Split):
        raise UserError(
            f"`dataset.blend_per_split` has {len(config.blend_per_split)} entries",
            hint="it has three, for train, validation and test; any may be null",
        )
    if not _is_split(config.split):
        raise UserError(
            f"`{config.split}` is not a split", hint="it is three shares for train, validation and test, as `969,30,1`"
        )
    if not 0 <= config.random_seed < 2**32:
        raise UserError(f"`dataset.random_seed` is {config.random_seed}", hint=f"choose one from 0 to {2**32 - 1}")
    if tokenizer is None and (config.eod_mask_loss or config.reset_position_ids or config.reset_attention_mask):
        raise UserError(
            "`dataset.eod_mask_loss`, `dataset.reset_position_ids` and `dataset.reset_attention_mask` need to know which token "
            "ends a document",
            hint="set `tokenizer.tokenizer_model`",
        )


def _is_split(split: str) -> bool:
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        return False
    return len(shares) <= len(Split) and all(0 <= share < math.inf for share in shares) and sum(shares) > 0
