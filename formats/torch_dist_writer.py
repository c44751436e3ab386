"""Write the `torch_dist` format as megatron-core 0.19 does: stacked keys, common state, `_extra_state` objects, trackers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, starmap
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from formats.archive_files import NewPart, Shard
from formats.dcp import ContainerWriter, NewObject
from formats.dcp_index import METADATA
from formats.errors import UserError
from formats.iterations import FORMAT, TRACKER, TRAIN_STATE, TRAIN_STATE_TRACKER, iteration_folder
from formats.object_names import ObjectName
from formats.optimizer.state import FULLY_RESHARDABLE
from formats.outputs import Outputs
from formats.spec import Array, Document, Region, Shape, Span, TensorSpec, dtype_name, extent
from formats.torch_dist import COMMON_STATE, in_key
from formats.torch_zip import object_archive

_PREDICTION = re.compile(r"(optimizer\.state\.\w+\.)?mtp\.")
"""What names of multi-token prediction layers begin with. Their keys keep the layer's number."""

STATE = "optimizer.state."
"""What keys of optimizer state begin with, before the kind of state and the weight's key: `optimizer.state.exp_avg.KEY`."""


class ShardedTensor(NamedTuple):
    """A weight and how ranks hold it: shards of it, each with the rank in whose file it goes."""

    spec: TensorSpec
    chunks: tuple[tuple[Region, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a checkpoint holds of a training run beside its tensors."""

    common: Mapping[str, Any] = MappingProxyType({})
    """Fields of the common state: `optimizer` with its parameter groups, `opt_param_scheduler`, `args`, …"""

    random_states: Mapping[ObjectName, bytes] = MappingProxyType({})
    """The archives of the states of random number generators."""

    train_state: bytes = b""
    """Megatron-Bridge's `train_state.pt`, where there is one."""

    def objects(self) -> Iterator[NewObject]:
        """Yield the objects that are not the common state; all are in the first rank's file."""
        for name, archive in self.random_states.items():
            yield NewObject(name, rank_file(0), archive)


def module_of(weight: str) -> str | None:
    """Return the module of a weight: its name without the last word. Some modules have no `_extra_state`: which, the caller of
    `TorchDistWriter` knows."""
    return weight.rpartition(".")[0]


class TorchDistWriter:
    """The layout of one iteration, under a root with its trackers."""

    def __init__(
        self,
        tensors: Iterable[ShardedTensor],
        *,
        iteration: int = 0,
        whole_model: bool = True,
        stacked: bool = True,
        stateful_module: Callable[[str], str | None] = module_of,
        weightless: Mapping[str, int] = MappingProxyType({}),
        run: RunState | None = None,
    ) -> None:
        """Of a `whole_model`, layers are stacked unless `stacked` is false, experts are, and every module gets its empty
        `_extra_state`. What has only some of a model's tensors keeps the layer's number in each key, and holds nothing else.

        `stateful_module`: the module of a weight that has an `_extra_state`, None where it has none. `weightless`: modules that
        have one and no weight, with the rank in whose file it goes. `run`: what there is of a training run to go on with.
        """
        run = run or RunState()
        self._folder = iteration_folder(iteration)
        self._whole_model, self._stacked = whole_model, stacked
        self.specs: dict[str, TensorSpec] = {}
        parts = _parts(self._noted(tensors), self._located)
        keys = _keys(self.specs.values(), parts)
        common = NewObject(COMMON_STATE, rank_file(0), _common(iteration, run.common, stacked=whole_model and stacked))
        states = chain(_extra_states(parts, keys, stateful_module), starmap(_extra_state, weightless.items()))
        objects = chain(states, run.objects(), [common]) if whole_model else [common]
        self._container = ContainerWriter(self._folder, keys, parts, objects)
        self._train_state = run.train_state or train_state(iteration)
        self._iteration = iteration

    def _noted(self, tensors: Iterable[ShardedTensor]) -> Iterator[ShardedTensor]:
        for tensor in tensors:
            self.specs[tensor.spec.name] = tensor.spec
            yield tensor

    def _located(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The key that a weight is stored under, and its rows there where layers or experts are stacked."""
        return _key_and_rows(name, stacked=self._whole_model and self._stacked)

    @property
    def files(self) -> dict[str, int]:
        return self._container.files

    @property
    def documents(self) -> dict[str, Document]:
        small = {FORMAT: Document.of(_FORMAT_DOCUMENT), TRAIN_STATE: Document.of(self._train_state)}
        inside = {**small, METADATA: self._container.metadata}
        return {f"{self._folder}/{name}": data for name, data in inside.items()}

    @property
    def markers(self) -> dict[str, bytes]:
        """Both trackers: Megatron-LM reads the text, Megatron-Bridge the other."""
        return {TRAIN_STATE_TRACKER: self._train_state, TRACKER: str(self._iteration).encode()}

    def spans(self, file: str) -> Iterator[Span]:
        return self._container.spans(file)

    def touched(self, name: str, region: Region | None = None) -> set[str]:
        key, rows = self._located(name)
        return self._container.touched(key, in_key(rows, region or self.specs[name].full_region))

    def file_offset(self, name: str, region: Region) -> int:
        key, rows = self._located(name)
        return self._container.file_offset(key, in_key(rows, region))

    def write(self, outputs: Outputs, name: str, region: Region, data: Array) -> None:
        key, rows = self._located(name)
        self._container.write(outputs, key, in_key(rows, region), data[(*(np.newaxis,) * len(rows), ...)])


_FORMAT_DOCUMENT = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode()


@cache
def rank_file(rank: int) -> str:
    return f"__{rank}_0.distcp"


def _parts(tensors: Iterable[ShardedTensor], locate: Callable[[str], tuple[str, tuple[int, ...]]]) -> list[NewPart]:
    """For each weight, where it is stored. Layers are held alike, so shards are taken apart once for all that share them."""
    known: dict[int, tuple[object, list[Shard]]] = {}  # with the chunks: as long as they live, nothing else has their `id`
    keys, last = dict[str, str](), tuple[int, ...]()  # one object for each key, and for rows that follow one another
    parts: list[NewPart] = []
    for spec, chunks in tensors:
        if id(chunks) not in known:
            shards = [Shard(tuple(part.start for part in region), extent(region), rank_file(rank)) for region, rank in chunks]
            known[id(chunks)] = chunks, shards
        key, rows = locate(spec.name)
        last = last if rows == last else rows
        parts.append(NewPart(keys.setdefault(key, key), last, known[id(chunks)][1]))
    return parts


def _keys(specs: Iterable[TensorSpec], parts: Sequence[NewPart]) -> dict[str, tuple[Shape, np.dtype[Any]]]:
    """The shape and dtype of each key. UserError where its rows are of two dtypes, or are not those of all layers and experts."""
    counts = Counter(part.key for part in parts)
    first: dict[str, TensorSpec] = {}
    last: dict[str, tuple[int, ...]] = {}
    for spec, (key, rows, _) in zip(specs, parts, strict=True):
        like = first.setdefault(key, spec)
        last[key] = tuple(map(max, last[key], rows)) if key in last else rows
        if spec.dtype != like.dtype:
            raise UserError(
                f"`{like.name}` is {dtype_name(like.dtype)} and `{spec.name}` is {dtype_name(spec.dtype)}, "
                "but Megatron keeps them as one tensor",
                hint="choose one dtype for all with `--dtype`",
            )
    whole = {key: (tuple(row + 1 for row in last[key]), spec) for key, spec in first.items()}
    for key, (sizes, _) in whole.items():
        if counts[key] != prod(sizes):
            raise UserError(
                f"`{key}` would stack {counts[key]} tensors as {' × '.join(map(str, sizes))}: not every layer has one",
                hint="a family whose layers differ says so: `named(stacked=False)` in its `CONFIG`",
            )
    return {key: ((*sizes, *spec.shape), spec.dtype) for key, (sizes, spec) in whole.items()}


def _key_and_rows(name: str, *, stacked: bool) -> tuple[str, tuple[int, ...]]:
    rows: tuple[int, ...] = ()
    if expert := _numbered(name, ".experts."):
        before, number, after = expert
        name, rows = f"{before}.experts.experts.{after}", (number,)
    if stacked and not _PREDICTION.match(name) and (layer := _numbered(name, ".layers.")):
        before, number, after = layer
        name, rows = f"{before}.layers.{after}", (number, *rows)
    return name, rows


def _numbered(name: str, word: str) -> tuple[str, int, str] | None:
    """Return what is before a word, the number after it, and what is after that; None where there is no such number."""
    before, separator, rest = name.partition(word)
    number, dot, after = rest.partition(".")
    return (before, int(number), after) if separator and dot and number.isdecimal() else None


def _extra_states(
    parts: Sequence[NewPart],
    keys: Mapping[str, tuple[Shape, np.dtype[Any]]],
    stateful_module: Callable[[str], str | None],
) -> Iterator[NewObject]:
    """The empty state that megatron-core asks for with every module: an object per layer and expert, in the module's file."""
    archive = _no_state()
    modules: dict[str, str] = {}
    for key in keys:
        if not key.startswith(STATE):
            modules.setdefault(stateful_module(key) or "", key)
    names = {key: f"{module}._extra_state" for module, key in modules.items() if module}
    """Of the first weight of each module that has a state, the key of its objects."""

    for key, rows, shards in parts:
        if key in names:
            yield NewObject(ObjectName(names[key], rows, keys[key][0][: len(rows)]), shards[0].file, archive)


def _extra_state(module: str, rank: int) -> NewObject:
    """The empty state of a module that is there once."""
    return NewObject(ObjectName(f"{module}._extra_state"), rank_file(rank), _no_state())


def _no_state() -> bytes:
    return object_archive([np.zeros(0, np.uint8)])


def _common(iteration: int, common: Mapping[str, Any], *, stacked: bool) -> bytes:
    content: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    content |= {} if stacked else {"non_homogeneous_layers": True}
    content |= _FULLY_RESHARDABLE if "optimizer" in common else {}
    return object_archive([{"checkpoint_version": 3.0, "iteration": iteration, **common, "content_metadata": content}])


_FULLY_RESHARDABLE = {
    "distrib_optim_sharding_type": FULLY_RESHARDABLE, "distrib_optim_fully_reshardable_mem_efficient": False,
}  # fmt: skip


def train_state(step: int) -> bytes:
    """Return Megatron-Bridge's record of progress: 0-d tensors."""
    counts = dict.fromkeys(("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"), 0)
    state: dict[str, Any] = {"step": step, **counts}
    arrays: dict[str, Array] = {name: np.array(value, np.int64) for name, value in state.items()}
    arrays["floating_point_operations_so_far"] = np.array(0.0, np.float32)
    arrays |= {name: np.array(False) for name in ("do_train", "do_valid", "do_test")}
    return object_archive(arrays, name="train_state")
