"""From `FinetuningDatasetConfig` to the datasets for training, validation and test: from files of examples, tokenized once and
kept, or from a folder in which `mbtrain pack` laid out tokens and rows beforehand; and such folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import blake3
import numpy as np

from formats.errors import UserError
from formats.home import expanded
from trainer.config import FinetuningDatasetConfig
from trainer.data import cache
from trainer.data.chat import packing, store
from trainer.data.chat.dataset import Examples
from trainer.data.chat.examples import Counts, Tokenized, identity, read_examples, tokenizer_identity
from trainer.data.chat.multi_source import blend, by_name
from trainer.data.chat.sources import Source
from trainer.data.chat.splits import SPLITS, Part, check_named, parts
from trainer.data.chat.store import Store
from trainer.data.interface import Splits
from trainer.settings import paths
from trainer.tokenizers import Tokenizer


def build(
    config: FinetuningDatasetConfig, *, tokenizer: Tokenizer | None, vocab_size: int, samples: tuple[int, int, int]
) -> Splits:
    """See `trainer.data.build`. Training has another order in each epoch; validation and test are the same each time, and begin
    anew where more is asked for than there is. The training dataset's `summary` says what was found."""
    if _is_laid_out(config):
        return cache.in_turn(lambda: _laid_out(config, Path(config.path or ""), tokenizer, vocab_size, samples))
    return cache.in_turn(lambda: _from_files(config, needed(tokenizer), vocab_size, samples))


def check(config: FinetuningDatasetConfig) -> None:
    """UserError where there is nothing to train on. To be called on every rank."""
    check_named(config)
    if not _is_laid_out(config):
        cache.in_turn(lambda: [part.source.files() for part in parts(config).train])


def _is_laid_out(config: FinetuningDatasetConfig) -> bool:
    return config.path is not None and is_packed(Path(config.path))


def needed(tokenizer: Tokenizer | None) -> Tokenizer:
    """UserError where there is none."""
    if tokenizer is None:
        raise UserError(
            "examples are to be tokenized, and there is no tokenizer",
            hint="name a folder that has one: `tokenizer.tokenizer_model=DIR`",
        )
    return tokenizer


def _from_files(config: FinetuningDatasetConfig, tokenizer: Tokenizer, vocab_size: int, samples: tuple[int, int, int]) -> Splits:
    found, notes = parts(config), list[str]()

    def opened(split: str, count: int) -> dict[Source, Examples]:
        """What a split is to have, by its sources."""
        made: dict[Source, Examples] = {}
        for part in found.of(split) if count else ():
            folder = Path(config.path_to_cache or f"{part.source.path}.cache")
            stored = _stored(part.source, folder, tokenizer, config, vocab_size)
            numbers = _numbers(part, stored)
            if len(numbers):
                made[part.source] = _dataset(config, stored, numbers, split=split, folder=folder)
            else:
                notes.append(_nothing(split, config, len(stored)))
        return made

    train, validation, test = (opened(split, count) for split, count in zip(SPLITS, samples, strict=True))
    told = [*_summary(train), *notes]
    blended = blend(config, train, found.weights, samples[0], told=told) if train else None
    return blended, by_name(validation, samples[1]), by_name(test, samples[2])


def _numbers(part: Part, found: Store) -> np.ndarray:
    """The examples that a part has, ascending: those of the conversations that it has."""
    groups = found.groups
    return np.flatnonzero(np.isin(groups, part.numbers(int(groups[-1]) + 1)))


def _dataset(config: FinetuningDatasetConfig, found: Store, numbers: np.ndarray, *, split: str, **further: Any) -> Examples:
    return Examples(
        found,
        numbers,
        sequence_length=config.sequence_length,
        packed=config.packed,
        multiple=config.pad_to_multiple_of or 1,
        seed=config.random_seed,
        shuffled=split == "train",
        **further,
    )


def _summary(train: Mapping[Source, Examples]) -> Iterator[str]:
    """What was found in each source."""
    for source, examples in train.items():
        about, of = examples.store.about, f"{source.name}: " if len(train) > 1 else ""
        filled = f"{100 * examples.efficiency:.1f} % of {'packed ' if examples.packed else ''}rows filled"
        yield from (f"{of}{about['said']}; {filled}", *about["reasons"])


def _nothing(split: str, config: FinetuningDatasetConfig, count: int) -> str:
    """Shares that nobody chose may leave few examples without validation or test: that is told, and no error."""
    why = f"`dataset.split={config.split}` of {count} examples leaves none for {split}"
    if split == "train" or config.split != FinetuningDatasetConfig.split:
        raise UserError(why, hint="change its share, or use more examples")
    return f"note: {why}"


_READING = 3
"""How examples are read. Tokens that are kept from before another way was learned are made again."""


def _stored(source: Source, folder: Path, tokenizer: Tokenizer, config: FinetuningDatasetConfig, vocab_size: int) -> Store:
    """All examples of a source in tokens: those made before, if nothing has changed that they depend on."""
    made_of = _identity(source, tokenizer, config)
    key = blake3.blake3(json.dumps([store.VERSION, _READING, vocab_size, made_of], sort_keys=True).encode()).hexdigest()[:32]
    counts = Counts()
    try:
        return store.kept(
            folder,
            f"tokens-{key}",
            lambda: read_examples(source, tokenizer, config, counts=counts),
            vocab_size=vocab_size,
            about=lambda: {"made_of": made_of, "said": str(counts), "reasons": counts.reasons()},
        )
    except OSError as error:
        raise cache.cannot_write(folder, "tokens", error) from error


def _identity(source: Source, tokenizer: Tokenizer, config: FinetuningDatasetConfig) -> dict[str, Any]:
    return {**identity(source, tokenizer, config), "split": source.split}


def is_packed(path: Path) -> bool:
    """Is this a folder that `pack` made?"""
    return store.is_store(path / "train")


@dataclass(frozen=True, slots=True)
class Packed:
    """What `pack` did with the examples of one split."""

    split: str
    examples: int
    tokens: int
    trained: int
    rows: int
    filled: float
    """The share of the rows that is tokens of examples."""

    said: str
    reasons: tuple[str, ...]


def pack(config: FinetuningDatasetConfig, out: Path, *, tokenizer: Tokenizer, vocab_size: int) -> list[Packed]:
    """Examples as tokens, and rows of them as full as can be, into a folder for `dataset.path`: one folder per split inside.

    UserError where `out` exists, or an example cannot be used.
    """
    if config.blend or isinstance(config.validation_path, list) or isinstance(config.test_path, list):
        raise UserError("several sources of a split cannot be packed beforehand", hint="pack one: `dataset.path`")
    out, config = Path(expanded(out)), replace(config)
    paths.expand_section(config)
    if out.exists():
        raise UserError(f"`{out}` exists", hint="choose another folder, or remove it")
    done: list[Packed] = []

    def write(folder: Path) -> None:
        several = parts(config)
        for split in SPLITS:
            for part in several.of(split):
                found = _stored(part.source, folder / "all", tokenizer, config, vocab_size)
                done.extend(_pack(config, part, found, folder / split, split=split))
        rmtree(folder / "all")

    try:
        ours = cache.put(out, write)
    except OSError as error:
        raise UserError(f"cannot write `{out}`: {error.strerror}", hint="choose a folder that can be written") from error
    if not ours:
        raise UserError(f"`{out}` appeared while it was being made", hint="choose another folder, or remove it")
    return done


def _pack(config: FinetuningDatasetConfig, part: Part, found: Store, folder: Path, *, split: str) -> Iterator[Packed]:
    numbers = _numbers(part, found)
    if not len(numbers):
        _nothing(split, config, len(found))
        return
    folder.mkdir()
    multiple = config.pad_to_multiple_of or 1
    rows = packing.filled(packing.padded(found.lengths[numbers], multiple=multiple), capacity=config.sequence_length)
    told = {name: found.about[name] for name in ("made_of", "said", "reasons")}
    told |= {"sequence_length": config.sequence_length, "pad_to_multiple_of": multiple, "rows": len(rows)}
    examples = (Tokenized(*found[number]) for number in numbers.tolist())
    store.write(folder, examples, vocab_size=found.about["vocab_size"], about=lambda: told)
    for name, array in zip(store.ROWS, (rows.examples, rows.starts), strict=True):
        store.save(folder / name, array)
    made = store.open_store(folder)
    filled = packing.efficiency(made.lengths, len(rows), capacity=config.sequence_length)
    counted = (made.about[name] for name in ("examples", "tokens", "trained"))
    yield Packed(split, *counted, len(rows), filled, told["said"], tuple(told["reasons"]))


def _laid_out(
    config: FinetuningDatasetConfig, folder: Path, tokenizer: Tokenizer | None, vocab_size: int, samples: tuple[int, int, int]
) -> Splits:
    for name in ("validation_path", "test_path"):
        if getattr(config, name):
            raise UserError(
                f"`dataset.{name}` is `{getattr(config, name)}`, but `{folder}` holds packed examples of all splits",
                hint="leave it out, or give it to `mbtrain pack`",
            )
    made: list[Examples | None] = []
    for split, count in zip(SPLITS, samples, strict=True):
        if not count or not store.is_store(folder / split):
            made.append(None)
            continue
        found = store.open_store(folder / split)
        _check_fits(found, config, tokenizer, vocab_size)
        made.append(_dataset(config, found, np.arange(len(found)), split=split, rows=found.rows).take(count))
    if made[0] is not None:
        made[0].summary = tuple(_summary({Source(folder): made[0]}))
    return made[0], made[1], made[2]


def _check_fits(found: Store, config: FinetuningDatasetConfig, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """What rows were composed for is what they are used for."""
    again = "pack the examples again"
    told = {**asdict(config), "pad_to_multiple_of": config.pad_to_multiple_of or 1}
    for name in ("sequence_length", "pad_to_multiple_of"):
        if told[name] != found.about[name]:
            raise UserError(
                f"`dataset.{name}` is `{told[name]}`, but `{found.folder}` was packed with `{found.about[name]}`",
                hint=f"set `dataset.{name}={found.about[name]}`, or {again}",
            )
    if not config.packed:
        raise UserError(f"`dataset.packed` is `False`, but `{found.folder}` holds packed examples", hint="leave it out")
    if tokenizer is not None and tokenizer_identity(tokenizer) != found.about["made_of"]["tokenizer"]:
        raise UserError(
            f"`{found.folder}` was packed with another tokenizer than this run's",
            hint=f"set `tokenizer.tokenizer_model` to the one it was packed with, or {again}",
        )
    if found.about["largest"] >= vocab_size:
        raise UserError(
            f"`{found.folder}` holds the token {found.about['largest']}, but the vocabulary has {vocab_size}",
            hint=f"{again} with the model's tokenizer",
        )
