"""A checkpoint of either format as a model that generates: what it says of itself, made into a run of one session."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from converter import carried, reference
from converter.inspect import HUGGINGFACE, kind
from converter.sources import open_source
from formats.errors import UserError
from formats.folder import Folder, LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.json_objects import read_json
from formats.spec import Reader, dtype_name
from formats.torch_dist import TorchDistReader
from trainer import device, model, parallel, tokenizers
from trainer.checkpoints import live
from trainer.config import RunConfig
from trainer.generation.sampling import Sampling
from trainer.generation.text import Generation, Tell, generate
from trainer.settings import checks, overrides
from trainer.settings.resolve import Resolved, resolve

PRECISIONS = {"fp32": "fp32", "bf16": "bf16_mixed", "fp16": "fp16_mixed"}
"""`mixed_precision` for the dtypes that weights may be computed in."""


@dataclass(frozen=True, slots=True)
class Described:
    """What a checkpoint says of itself."""

    config: dict[str, Any]
    """The model's `config.json`."""

    dtype: str
    """Of most of its weights."""

    places: tuple[Folder, ...]
    """Where its tokenizer may be; the first that has one counts."""


def describe(source: str) -> Described:
    """Look at a Hugging Face directory, a Hub id or a Megatron checkpoint; no weight is read.

    Raises UserError where it is none of these, or does not say what model it is.
    """
    folder = open_source(source, or_hub=True)
    if kind(folder) == HUGGINGFACE:
        with closing(HuggingFaceReader(folder)) as reader:
            return Described(read_json(folder, carried.CONFIG), _dtype(reader), (folder,))
    with closing(TorchDistReader(folder)) as reader:
        try:
            config = reference.find(reader, None).config
        except reference.UnknownModelError as error:
            raise UserError(
                str(error.args[0]), hint="generate from a checkpoint of `mbconvert` or `mbtrain`, which have a `config.json`"
            ) from error
        # The first has `generation_config.json` as well, the second is all that Megatron-Bridge writes.
        inside = reader.folder
        return Described(dict(config), _dtype(reader), (inside.below(carried.FILES), inside.below("tokenizer")))


def _dtype(reader: Reader) -> str:
    sizes: Counter[str] = Counter()
    for spec in reader.specs.values():
        sizes[dtype_name(spec.dtype)] += prod(spec.shape)
    return sizes.most_common(1)[0][0]


def make_run(source: str, told: Sequence[str] = (), *, world_size: int, dtype: str | None = None) -> Resolved:
    """A run that holds the checkpoint's model in `world_size` processes, with overrides such as
    `model.tensor_model_parallel_size=2`.

    The dtype is the one given, else fp32 on the CPU and the checkpoint's on a GPU. UserError for what cannot run.
    """
    found = describe(source)
    config = RunConfig(model=model.from_hf_config(found.config), mixed_precision="")
    overrides.apply(config, told)
    where = device.choose(config.dist.device)
    config.mixed_precision = config.mixed_precision or _precision(dtype or ("fp32" if where == device.CPU else found.dtype))
    config.dataset.sequence_length = config.model.seq_length
    config.optimizer.lr = 1.0  # no run resolves without one; nothing is trained
    _check_copies(config.model, world_size)
    config.train.global_batch_size = checks.size(config.model, checks.PP)
    return resolve(config, world_size=world_size, device=where)


def _precision(dtype: str) -> str:
    if dtype not in PRECISIONS:
        raise UserError(f"the checkpoint's weights are `{dtype}`", hint="choose `--dtype` bf16, fp16 or fp32 to compute in")
    return PRECISIONS[dtype]


def _check_copies(shape: Any, world_size: int) -> None:
    copies = checks.data_parallel_size(shape, world_size)
    if copies > 1:
        one = world_size // copies
        raise UserError(
            f"`{world_size}` processes would hold the model `{copies}` times, and prompts go one after another",
            hint=f"start {one}, or divide the model: `model.{checks.TP}={world_size}`, for example",
        )


def run(
    source: str,
    read_prompts: Callable[[], Sequence[str]],
    *,
    settings: Resolved,
    max_new_tokens: int,
    sampling: Sampling,
    tell: Tell | None,
    done: Callable[[Sequence[Generation], float], None],
) -> None:
    """Load the checkpoint and generate. `read_prompts` is called on every rank with the session open; `tell`, with text as it
    comes, and `done`, with all and the seconds they took, on one."""
    config = settings.config
    where = device.choose(config.dist.device)
    with parallel.session(config, where), tokenizer_of(source, config.tokenizer.tokenizer_model) as tokenizer:
        prompts = read_prompts()
        chunks = model.build(config.model)
        live.load(chunks, source)
        make = partial(generate, chunks, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        began = time.perf_counter()
        answers = make(tell=tell if parallel.speaks() else None)
        if parallel.speaks():
            done(answers, time.perf_counter() - began)


@contextmanager
def tokenizer_of(source: str, given: str | None = None) -> Iterator[tokenizers.Tokenizer]:
    """The tokenizer given, else the checkpoint's own. UserError where there is none."""
    if given:
        yield tokenizers.load(given)
        return
    for place in describe(source).places:
        if {"tokenizer.json", *tokenizers.ANY_TOKENIZER} & set(place.children()):
            with _local(place) as path:
                yield tokenizers.load(str(path))
            return
    raise UserError(f"`{source}` has no tokenizer", hint="name a folder that has one: `tokenizer.tokenizer_model=DIR`")


@contextmanager
def _local(place: Folder) -> Iterator[Path]:
    """The folder itself, or its tokenizer's files on this disk."""
    if isinstance(place, LocalFolder):
        yield place.path
        return
    with TemporaryDirectory() as made:
        for name in set(place.children()).intersection(tokenizers.SIDE_FILES):
            (Path(made) / name).write_bytes(place.get(name))
        yield Path(made)
