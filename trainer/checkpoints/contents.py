"""What a checkpoint or a Hugging Face directory says of itself: its model, its dtype, its tokenizer. Reads no weight."""

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
from converter.sources import open_source
from formats.detect import Format, detect, open_megatron
from formats.errors import UserError
from formats.folder import Folder, LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.iterations import find_iteration
from formats.json_objects import read_json
from formats.spec import Reader, dtype_name
from trainer import tokenizers
from trainer.checkpoints import iterations

if TYPE_CHECKING:
    from trainer.config import RunConfig


@dataclass(frozen=True, slots=True)
class Described:
    """What a checkpoint says of itself."""

    config: dict[str, Any]
    """The model's `config.json`."""

    dtype: str
    """Of most of its weights."""


def describe(source: str) -> Described:
    """Look at a Hugging Face directory, a Hub id or a Megatron checkpoint; no weight is read.

    Raises UserError where it is none of these, or does not say what model it is.
    """
    folder = open_source(source, or_hub=True)
    if detect(folder) is not Format.TORCH_DIST:
        with closing(HuggingFaceReader(folder)) as reader:
            return Described(read_json(folder, side_files.CONFIG), _dtype(reader))
    with closing(open_megatron(folder)) as reader:
        try:
            config = reference.find(reader, None).config
        except reference.UnknownModelError as error:
            raise UserError(
                str(error.args[0]),
                hint="text is generated from checkpoints with a `config.json`: those of `mbconvert`, and those of `mbtrain` for "
                "a model that a `config.json` describes (not for a mixture of experts, or a model of your own)",
            ) from error
        return Described(dict(config), _dtype(reader))


def places(source: str) -> tuple[Folder, ...]:
    """Where the tokenizer may be; the first that has one counts."""
    folder = open_source(source, or_hub=True)
    if detect(folder) is not Format.TORCH_DIST:
        return (folder,)
    inside = find_iteration(folder)
    # The first has `generation_config.json` as well, the second is all that Megatron-Bridge writes.
    return inside.below(side_files.FILES), inside.below("tokenizer")


def _dtype(reader: Reader) -> str:
    sizes: Counter[str] = Counter()
    for spec in reader.specs.values():
        sizes[dtype_name(spec.dtype)] += prod(spec.shape)
    return sizes.most_common(1)[0][0]


def tokenizer_of(source: str, given: str | None = None) -> tokenizers.Tokenizer:
    """The tokenizer given, else the checkpoint's own. UserError where there is none."""
    if given:
        return tokenizers.load(given)
    place = next(filter(_has_tokenizer, places(source)), None)
    if place is not None:
        return _load(place)
    raise UserError(f"`{source}` has no tokenizer", hint="name a folder that has one: `tokenizer.tokenizer_model=DIR`")


def tokenizer_of_run(config: RunConfig, *, resumed: Path | None = None) -> tokenizers.Tokenizer | None:
    """The one that is named, else that of the weights to start from, else that of the checkpoint that is resumed (or that a run
    would resume), else the one beside the model's own files; None where there is none."""
    named, start = config.tokenizer.tokenizer_model, config.checkpoint.pretrained_checkpoint
    found = tokenizers.of_run(named, beside=start)
    if found is not None:
        return found
    resumed = resumed or iterations.latest(config.checkpoint.load)
    for source in filter(None, (start, resumed and str(resumed))):
        place = next(filter(_has_tokenizer, places(source)), None)
        if place is not None:
            return _load(place)
    return tokenizers.of_run(None, beside=getattr(config.model, "hf_source", None))


def _has_tokenizer(place: Folder) -> bool:
    return bool({"tokenizer.json", *tokenizers.ANY_TOKENIZER} & set(place.children()))


def _load(place: Folder) -> tokenizers.Tokenizer:
    """From the folder itself; from another machine's, by way of a folder here that stays as long as the tokenizer."""
    if isinstance(place, LocalFolder):
        return tokenizers.load(str(place.path))
    made = TemporaryDirectory()
    for name in set(place.children()).intersection(tokenizers.SIDE_FILES):
        (Path(made.name) / name).write_bytes(place.get(name))
    found = tokenizers.load(made.name)
    weakref.finalize(found, made.cleanup)
    return found
