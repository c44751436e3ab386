"""What an export decides beside the weights: which file holds which tensor, and what changes in the documents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from converter.carried import CONFIG, EXTRAS, Reference
from converter.families import Family
from converter.model import Model
from converter.plan import Copy, Making
from converter.rules import fill
from formats.errors import UserError, shown
from formats.huggingface import INDEX, HuggingFaceReader, Shard, make_index, plan_shards, retyped
from formats.spec import dtype_name

DEFAULT_SHARD_BYTES = 5_000_000_000
"""What transformers' `save_pretrained` takes."""

_CONFIG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def with_carried(
    makings: Sequence[Making], family: Family, model: Model, origin: Reference
) -> tuple[list[Making], list[HuggingFaceReader]]:
    """The makings, and those of tensors the source had that Megatron has not: a tied output layer, and extras; with the
    readers that extras come from."""
    made = {making.spec.name: making for making in makings}
    had = {name for shard in origin.shards.values() for name in shard.tensors}
    tied = [
        replace(made[rule.same_as], spec=replace(made[rule.same_as].spec, name=name))
        for rule in family.RULES
        if rule.same_as and not rule.when(model)
        for name in rule.names(0)[1]
        if name in had
    ]
    if origin.extras is None:
        return [*makings, *tied], []
    reader = HuggingFaceReader(origin.extras.parent, files=[origin.extras.name])
    return [*makings, *tied, *_untouched(reader, family, model)], [reader]


def _untouched(reader: HuggingFaceReader, family: Family, model: Model) -> Iterator[Making]:
    """Extras as they are. A file that was tampered with must not put other tensors in the place of weights."""
    known = {fill(template, layer) for template in family.EXTRAS for layer in range(model.layers)}
    for spec in reader.specs.values():
        if spec.name not in known or not spec.shape:
            raise UserError(f"`{EXTRAS}` holds `{spec.name}` of shape {list(spec.shape)}, for which this family has no place")
        yield Making(spec, (Copy(spec.name, spec.dtype, 0, 0, spec.shape[0]),))


def choose_shards(makings: Sequence[Making], origin: Reference, limit: int | None) -> dict[str, Shard]:
    """The files to write: those that travelled if they hold just these names and shapes, else files of at most `limit`."""
    if limit is None and _shapes(origin.shards) == {making.spec.name: making.spec.shape for making in makings}:
        dtypes = {making.spec.name: making.spec.dtype for making in makings}
        return {file: retyped(shard, dtypes, source=file) for file, shard in origin.shards.items()}
    return plan_shards([making.spec for making in makings], limit=limit or DEFAULT_SHARD_BYTES)


def _shapes(shards: Mapping[str, Shard]) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for shard in shards.values() for name, (spec, _) in shard.tensors.items()}


def in_file_order(makings: Sequence[Making], shards: Mapping[str, Shard]) -> list[Making]:
    """Makings in the order in which their data lies in the files, so that each file is written front to back."""
    made = {making.spec.name: making for making in makings}
    return [made[name] for shard in shards.values() for name in shard.tensors]


def documents(origin: Reference, shards: Mapping[str, Shard], *, limited: bool) -> tuple[dict[str, bytes], list[str]]:
    """Documents that are not copied as they travelled, and notes on why: the index of other files, a `config.json` whose
    dtype changed or that was rebuilt."""
    made: dict[str, bytes] = {}
    notes: list[str] = []
    if origin.shards and not limited and _shapes(origin.shards) != _shapes(shards):
        notes.append("the shard map that travelled is of other tensors than these: files are divided anew")
    if dict(shards) != dict(origin.shards) and (len(shards) > 1 or INDEX in origin.files):
        made[INDEX] = make_index(shards)
    config = _retyped_config(origin, shards)
    if config != origin.config or CONFIG not in origin.files:
        made[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
        fresh = CONFIG not in origin.files
        notes.append(f"`{CONFIG}` is {origin.origin}" if fresh else f"`{CONFIG}` changed: {_dtype_change(origin, config)}")
    return made, notes


def _retyped_config(origin: Reference, shards: Mapping[str, Shard]) -> dict[str, Any]:
    """`config.json` with the dtype of the weights written, if that is not what the files it belongs to have."""
    config, dtype = dict(origin.config), _main_dtype(shards)
    if origin.shards and _main_dtype(origin.shards) == dtype:
        return config
    return {**config, _dtype_field(config): _CONFIG_NAMES.get(dtype_name(dtype), dtype_name(dtype))}


def _dtype_field(config: Mapping[str, Any]) -> str:
    """transformers 4 wrote `torch_dtype`, 5 writes `dtype`."""
    return "torch_dtype" if "torch_dtype" in config else "dtype"


def _dtype_change(origin: Reference, config: Mapping[str, Any]) -> str:
    field = _dtype_field(config)
    return f"`{field}` from `{shown(origin.config.get(field))}` to `{config[field]}`"


def _main_dtype(shards: Mapping[str, Shard]) -> np.dtype[Any]:
    """The dtype most bytes have."""
    sizes: dict[np.dtype[Any], int] = {}
    for shard in shards.values():
        for spec, _ in shard.tensors.values():
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])
