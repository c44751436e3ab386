"""Read the model, dtype and tokenizer of a checkpoint or a Hugging Face directory. Reads no weight."""

from __future__ import annotations

import weakref
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from converter import reference, side_files
from converter.dequantization import dequantized
from converter.sources import open_source
from formats.detect import detect, open_huggingface, open_megatron
from formats.errors import UserError
from formats.folder import Folder, LocalFolder
from formats.iterations import find_iteration
from formats.spec import Reader, dtype_name
from trainer import tokenizers
from trainer.checkpoints import iterations

if TYPE_CHECKING:
    from trainer.config import RunConfig


@dataclass(frozen=True, slots=True)
class Described:
    """The model and dtype of a checkpoint."""

    config: dict[str, Any]
    """The model's `config.json`."""

    dtype: str
    """Of most of its weights."""


def describe(source: str) -> Described:
    """Return the model and dtype of a Hugging Face directory, a Hub id or a Megatron checkpoint.

    Raises UserError if it is none of these, or has no `config.json`.
    """
    folder = open_source(source, or_hub=True)
    if not detect(folder).is_megatron:
        with closing(open_huggingface(folder, any_dtype=True)) as reader:
            config = side_files.config_of(reader)
            return Described(config, _dtype(dequantized(reader, config)))
    with closing(open_megatron(folder)) as reader:
        try:
            config = reference.find(reader, None).config
        except reference.UnknownModelError as error:
            raise UserError(
                str(error.args[0]),
                hint="text is generated from checkpoints with a `config.json`: those of `mbconvert`, and those of `mbtrain` for "
                "a model that a `config.json` describes (not for every mixture of experts, nor for a model of your own)",
            ) from error
        return Described(dict(config), _dtype(reader))


def tokenizer_folders(source: str) -> tuple[Folder, ...]:
    """Return the folders that may hold the tokenizer; the first that has one is used."""
    folder = open_source(source, or_hub=True)
    if not detect(folder).is_megatron:
        return (folder,)
    iteration = find_iteration(folder)
    # The first has `generation_config.json` as well; Megatron-Bridge writes only the second.
    return iteration.below(side_files.FILES), iteration.below("tokenizer")


def _dtype(reader: Reader) -> str:
    sizes: Counter[str] = Counter()
    for spec in reader.specs.values():
        sizes[dtype_name(spec.dtype)] += prod(spec.shape)
    return sizes.most_common(1)[0][0]


def tokenizer_of(source: str, name: str | None = None) -> tokenizers.Tokenizer:
    """Return the tokenizer `given`, else the checkpoint's own. Raises UserError if there is none."""
    if name:
        return tokenizers.load(name)
    folder = next(filter(_has_tokenizer, tokenizer_folders(source)), None)
    if folder is not None:
        return _load(folder)
    raise UserError(f"`{source}` has no tokenizer", hint="name a folder that has one: `tokenizer.tokenizer_model=DIR`")


def tokenizer_of_run(config: RunConfig, *, resumed: Path | None = None) -> tokenizers.Tokenizer | None:
    """Return the tokenizer that the settings name, else that of the weights to start from, else that of the checkpoint that is
    resumed (or that a run would resume), else the one beside the model's own files; None if there is none."""
    name, start = config.tokenizer.tokenizer_model, config.checkpoint.pretrained_checkpoint
    tokenizer = tokenizers.of_run(name, beside=start)
    if tokenizer is not None:
        return tokenizer
    resumed = resumed or iterations.latest(config.checkpoint.load)
    for source in filter(None, (start, resumed and str(resumed))):
        folder = next(filter(_has_tokenizer, tokenizer_folders(source)), None)
        if folder is not None:
            return _load(folder)
    return tokenizers.of_run(None, beside=getattr(config.model, "hf_source", None))


def _has_tokenizer(folder: Folder) -> bool:
    return bool({"tokenizer.json", *tokenizers.ANY_TOKENIZER} & set(folder.children()))


def _load(folder: Folder) -> tokenizers.Tokenizer:
    """Load a tokenizer; from a remote folder, through a temporary one that exists as long as the tokenizer."""
    if isinstance(folder, LocalFolder):
        return tokenizers.load(str(folder.path))
    temporary = TemporaryDirectory()
    for name in set(folder.children()).intersection(tokenizers.SIDE_FILES):
        (Path(temporary.name) / name).write_bytes(folder.get(name))
    tokenizer = tokenizers.load(temporary.name)
    weakref.finalize(tokenizer, temporary.cleanup)
    return tokenizer
