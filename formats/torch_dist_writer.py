"""Write the `torch_dist` format as megatron-core 0.19 does: stacked keys, common state, `_extra_state` objects, trackers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from formats.archive_files import Box, NewPart
from formats.dcp import ContainerWriter, NewObject
from formats.dcp_index import METADATA
from formats.errors import UserError
from formats.iterations import FORMAT, TRACKER, TRAIN_STATE, TRAIN_STATE_TRACKER, iteration_folder
from formats.outputs import Outputs
from formats.spec import Array, Document, Region, Shape, Span, TensorSpec, dtype_name, extent
from formats.torch_dist import COMMON_KEY
from formats.torch_zip import object_archive

_STATELESS = {"word_embeddings", "position_embeddings", "output_layer", "router", "shared_experts"}
"""Modules that have weights and no `_extra_state`; every other module of Transformer Engine's has one."""

_NUMBERED_LAYER = re.compile(r"(.*?\blayers)\.(\d+)\.(.+)")


class ShardedTensor(NamedTuple):
    """A weight and how ranks hold it: boxes of it, each with the rank in whose file it goes."""

    spec: TensorSpec
    chunks: tuple[tuple[Region, int], ...]


class TorchDistWriter:
    """The layout of one iteration, under a root with its trackers."""

    def __init__(self, placed: Iterable[ShardedTensor], *, iteration: int = 0, whole_model: bool = True) -> None:
        """Of a `whole_model`, layers are stacked and every module gets its empty `_extra_state`. What has only some of a
        model's tensors keeps the layer's number in each key, and holds nothing else."""
        self._folder = iteration_folder(iteration)
        self._whole_model = whole_model
        self.specs: dict[str, TensorSpec] = {}
        parts = _parts(self._noted(placed), self._located)
        common = NewObject(COMMON_KEY, rank_file(0), _common(iteration, stacked=whole_model))
        objects = chain(_extra_states(parts), [common]) if whole_model else [common]
        self._container = ContainerWriter(self._folder, _whole(self.specs.values(), parts), parts, objects)
        self._iteration = iteration

    def _noted(self, placed: Iterable[ShardedTensor]) -> Iterator[ShardedTensor]:
        for item in placed:
            self.specs[item.spec.name] = item.spec
            yield item

    def _located(self, name: str) -> tuple[str, int | None]:
        """The key that a weight is stored under, and its row there where layers are stacked."""
        return _key_and_row(name) if self._whole_model else (name, None)

    @property
    def files(self) -> dict[str, int]:
        return self._container.files

    @property
    def documents(self) -> dict[str, Document]:
        small = {FORMAT: Document.of(_FORMAT_DOCUMENT), TRAIN_STATE: Document.of(_train_state(self._iteration))}
        inside = {**small, METADATA: self._container.metadata}
        return {f"{self._folder}/{name}": data for name, data in inside.items()}

    @property
    def markers(self) -> dict[str, bytes]:
        """Both trackers: Megatron-LM reads the text, Megatron-Bridge the other."""
        return {TRAIN_STATE_TRACKER: _train_state(self._iteration), TRACKER: str(self._iteration).encode()}

    def spans(self, file: str) -> Iterator[Span]:
        return self._container.spans(file)

    def touched(self, name: str, region: Region | None = None) -> set[str]:
        key, row = self._located(name)
        return self._container.touched(key, _in_key(row, region or self.specs[name].full_region))

    def file_offset(self, name: str, region: Region) -> int:
        key, row = self._located(name)
        return self._container.file_offset(key, _in_key(row, region))

    def write(self, outputs: Outputs, name: str, region: Region, data: Array) -> None:
        key, row = self._located(name)
        self._container.write(outputs, key, _in_key(row, region), data if row is None else data[np.newaxis])


_FORMAT_DOCUMENT = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode()


@cache
def rank_file(rank: int) -> str:
    return f"__{rank}_0.distcp"


def _in_key(row: int | None, region: Region) -> Region:
    """A region of a weight, in the key it is stored under."""
    return region if row is None else (slice(row, row + 1), *region)


def _parts(placed: Iterable[ShardedTensor], locate: Callable[[str], tuple[str, int | None]]) -> list[NewPart]:
    """For each weight, where it is stored. Layers are held alike, so boxes are taken apart once for all that share them."""
    known: dict[int, list[Box]] = {}
    keys: dict[str | int | None, Any] = {}  # one object for each key and row, of hundreds of thousands
    parts: list[NewPart] = []
    for spec, chunks in placed:
        boxes = known.get(id(chunks))
        if boxes is None:
            boxes = [Box(tuple(part.start for part in region), extent(region), rank_file(rank)) for region, rank in chunks]
            known[id(chunks)] = boxes
        key, row = locate(spec.name)
        parts.append(NewPart(keys.setdefault(key, key), keys.setdefault(row, row), boxes))
    return parts


def _whole(specs: Iterable[TensorSpec], parts: Sequence[NewPart]) -> dict[str, tuple[Shape, np.dtype[Any]]]:
    """The shape and dtype of each key."""
    counts = Counter(part.key for part in parts)
    first: dict[str, TensorSpec] = {}
    whole: dict[str, tuple[Shape, np.dtype[Any]]] = {}
    for spec, (key, row, _) in zip(specs, parts, strict=True):
        like = first.get(key)
        if like is None:
            first[key], whole[key] = spec, (spec.shape if row is None else (counts[key], *spec.shape), spec.dtype)
        elif spec.dtype != like.dtype:
            raise UserError(
                f"`{like.name}` is {dtype_name(like.dtype)} and `{spec.name}` is {dtype_name(spec.dtype)}, "
                "but Megatron keeps them as one tensor",
                hint="choose one dtype for all with `--dtype`",
            )
    return whole


def _key_and_row(name: str) -> tuple[str, int | None]:
    numbered = _NUMBERED_LAYER.fullmatch(name)
    return (f"{numbered[1]}.{numbered[3]}", int(numbered[2])) if numbered else (name, None)


def _extra_states(parts: Sequence[NewPart]) -> Iterator[NewObject]:
    """The empty state that megatron-core asks for with every module: one object per layer, in the module's own file."""
    archive = object_archive([np.zeros(0, np.uint8)])
    layers = len({part.row for part in parts if part.row is not None})
    seen = set[str]()
    for key, row, boxes in parts:
        module = key.rpartition(".")[0]
        name = f"{module}._extra_state/{'shard_0_1' if row is None else f'shard_{row}_{layers}'}"
        if name in seen or module.rpartition(".")[2] in _STATELESS:
            continue
        seen.add(name)
        yield NewObject(name, boxes[0].file, archive)


def _common(iteration: int, *, stacked: bool) -> bytes:
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    content |= {} if stacked else {"non_homogeneous_layers": True}
    return object_archive([{"checkpoint_version": 3.0, "iteration": iteration, "content_metadata": content}])


def _train_state(step: int) -> bytes:
    """Megatron-Bridge's record of progress: 0-d tensors."""
    counts = dict.fromkeys(("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"), 0)
    state: dict[str, Any] = {"step": step, **counts}
    arrays: dict[str, Array] = {name: np.array(value, np.int64) for name, value in state.items()}
    arrays["floating_point_operations_so_far"] = np.array(0.0, np.float32)
    arrays |= {name: np.array(False) for name in ("do_train", "do_valid", "do_test")}
    return object_archive(arrays, name="train_state")
