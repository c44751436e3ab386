"""Megatron's conventions on top of PyTorch's container, for the `torch_dist` format of megatron-core 0.19.

One name per layer outside, stacked keys inside: `decoder.layers.7.mlp.linear_fc2.weight` is row 7 of the key
`decoder.layers.mlp.linear_fc2.weight`. Checkpoints that keep the number in the key read the same. Knows roots and
iterations, trackers, common state and `_extra_state` objects; knows no model family.
"""

from __future__ import annotations

import json
import re
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from formats.archive_files import Box, NewPart
from formats.chunks import Chunk, ChunkedTensor
from formats.dcp import Container, ContainerWriter, NewObject
from formats.dcp_index import METADATA
from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.json_objects import read_json
from formats.outputs import Outputs
from formats.pickles import Record
from formats.spec import Array, Document, Region, Shape, Span, TensorSpec, dtype_name, extent
from formats.torch_zip import OpenArchive, object_archive

TRACKER = "latest_checkpointed_iteration.txt"
TRAIN_STATE = "train_state.pt"
TRAIN_STATE_TRACKER = f"latest_{TRAIN_STATE}"
FORMAT = "metadata.json"
COMMON = "common.pt"
COMMON_KEY = "common_state/shard_0_1"

MOST_LAYERS = 1 << 15
MOST_WEIGHTS = 1 << 18
"""More than any model has: a damaged shape must not be counted through."""

_STATELESS = {"word_embeddings", "position_embeddings", "output_layer", "router", "shared_experts"}
"""Modules that have weights and no `_extra_state`; every other module of Transformer Engine's has one."""

_NOT_WEIGHTS = re.compile(r"^(optimizer|chained_\d+|rng_state|rerun_state_machine_state|dataloader)[._]")
_GATE, _UP = "_w", "_v"
"""With `singleton_local_shards`, megatron-core stores a gated projection as two tensors of these endings."""

_LEGACY_RANK = re.compile(r"mp_rank_\d+(_\d+)*/")

_NUMBERED_LAYER = re.compile(r"(.*?\blayers)\.(\d+)\.(.+)")
_LAYER_NUMBER = re.compile(r"\blayers\.(\d+)\.")
_STACKED_LAYER = re.compile(r"(.*?\blayers)\.(?!\d+\.)(.+)")


def iteration_folder(number: int) -> str:
    return f"iter_{number:07d}"


def find_iteration(folder: Folder) -> Folder:
    """The iteration folder that a root's tracker chooses, or the one given.

    Raises UserError for what is not there, not complete, or another format.
    """
    refuse_legacy(folder)
    if folder.has(METADATA):
        return folder
    if not folder.has(TRACKER):
        if any(name.endswith(".distcp") for name in folder.children()):
            raise unfinished(folder)
        raise UserError(
            f"`{folder.label}` is not a Megatron checkpoint: it has neither `{TRACKER}` nor `{METADATA}`",
            hint="point at the checkpoint's root, or at one iteration in it (`iter_0000100`)",
        )
    tracked = folder.get(TRACKER).decode(errors="replace").strip()
    if not re.fullmatch(r"\d{1,18}|release", tracked):
        raise UserError(f"`{TRACKER}` says `{tracked[:40]}`, which is not an iteration")
    chosen = tracked if tracked == "release" else iteration_folder(int(tracked))
    if not folder.below(chosen).children():
        there = ", ".join(name.rstrip("/") for name in folder.children() if name.startswith("iter_")) or "none"
        raise UserError(f"`{TRACKER}` says iteration {tracked}, but `{chosen}` is not there", hint=f"there are: {there}")
    refuse_legacy(folder.below(chosen))
    if not folder.below(chosen).has(METADATA):
        raise unfinished(folder.below(chosen))
    return folder.below(chosen)


def unfinished(folder: Folder) -> UserError:
    """The error for an iteration that has no index."""
    return UserError(
        f"`{folder.label}` has no `{METADATA}`: its saving never finished",
        hint="use an earlier iteration; `.metadata` is what megatron-core writes last",
    )


def refuse_legacy(folder: Folder) -> None:
    """Raise UserError for an iteration in one of Megatron's other formats."""
    if any(_LEGACY_RANK.fullmatch(name) for name in folder.children()):
        raise UserError(
            f"`{folder.label}` is in Megatron's legacy `mp_rank_*` format, which is not supported yet",
            hint="load it in Megatron-LM and save it with `--ckpt-format torch_dist`",
        )
    backend = read_json(folder, FORMAT).get("sharded_backend", "torch_dist") if folder.has(FORMAT) else "torch_dist"
    if backend != "torch_dist":
        raise other_format(folder, format_untrusted(backend))


def other_format(folder: Folder, name: str) -> UserError:
    """The error for an iteration in the format of that name."""
    return UserError(
        f"`{folder.label}` is in the `{name}` format, which is not supported yet",
        hint="load it in Megatron-LM and save it with `--ckpt-format torch_dist`",
    )


class TorchDistReader:
    """An opened iteration. `specs` are its weights, one name per layer; `others` what else it holds (optimizer, …)."""

    def __init__(self, folder: Folder, *, prefix: str = "", container: Container | None = None) -> None:
        """With a `prefix`: what `beside` describes, in a `container` that was opened already."""
        self.folder = find_iteration(folder)
        self.container = container or Container(self.folder)
        self._prefix = prefix
        self.others = [name for name in self.container.tensor_names if _NOT_WEIGHTS.match(name)]
        self.specs: dict[str, TensorSpec] = {}
        self._numbered: dict[str, int] = {}
        """Keys of stacked layers, each with where in a weight's name the number of its layer stands."""

        self._halved: dict[str, ChunkedTensor] = {}
        self._lock = threading.Lock()
        weights = dict.fromkeys(key for key in self.container.tensor_names if not _NOT_WEIGHTS.match(key))
        if prefix:
            weights = self._kept_beside(weights)
        halves = {key: key.removesuffix(_GATE) + _UP for key in weights if key.endswith(_GATE)}
        halves = {gate: up for gate, up in halves.items() if up in weights}
        ups = set(halves.values())
        self._keys = {key: halves.get(key) for key in weights if key not in ups}
        """Keys without the prefix, each with that whose rows follow."""

        for key in (key for key in self._keys if key not in halves):
            self._add(key)
        for gate, up in halves.items():
            self._add_halves(gate, up)

    @property
    def has_optimizer(self) -> bool:
        return any(name.startswith(("optimizer", "chained_")) for name in self.others)

    def beside(self, prefix: str) -> TorchDistReader:
        """What an optimizer keeps of weights, in their shapes and by their names: with `optimizer.state.exp_avg.`, a moment."""
        return TorchDistReader(self.folder, prefix=prefix, container=self.container)

    def _kept_beside(self, weights: Iterable[str]) -> dict[str, None]:
        shape, there = self.container.shape, set(self.others)
        kept = (key for key in weights if f"{self._prefix}{key}" in there)
        return dict.fromkeys(key for key in kept if shape(f"{self._prefix}{key}") == shape(key))

    def _shape(self, key: str) -> Shape:
        return self.container.shape(self._prefix + key)

    def _dtype(self, key: str) -> np.dtype[Any]:
        return self.container.dtype(self._prefix + key)

    def _add(self, key: str) -> None:
        shape, dtype = self._shape(key), self._dtype(key)
        stacked = _STACKED_LAYER.fullmatch(key)
        if not stacked:
            self._name(key, shape, dtype)
            return
        if not shape or shape[0] > MOST_LAYERS:
            raise UserError(f"`{key}` has shape {list(shape)}, whose first number should count layers")
        self._numbered[key] = stacked.end(1) + 1
        layer = shape[1:]
        for row in range(shape[0]):
            self._name(f"{stacked[1]}.{row}.{stacked[2]}", layer, dtype)

    def _add_halves(self, gate: str, up: str) -> None:
        shape, other = self._shape(gate), self._shape(up)
        if other != shape or not shape:
            raise UserError(f"`{gate}` has shape {list(shape)}, `{up}` has {list(other)}")
        self._name(gate.removesuffix(_GATE), (2 * shape[0], *shape[1:]), self._dtype(gate))

    def _name(self, name: str, shape: Shape, dtype: np.dtype[Any]) -> None:
        if name in self.specs:
            raise UserError(f"`{name}` is stored twice: stacked with its layers and on its own")
        if len(self.specs) >= MOST_WEIGHTS:
            raise UserError(f"`{METADATA}` describes more than {MOST_WEIGHTS} weights", hint="the checkpoint is damaged")
        self.specs[name] = TensorSpec(name, shape, dtype)

    def _source(self, name: str) -> tuple[str, int | None]:
        """The key that a weight is stored under, and its row there where layers are stacked. Worked out when it is asked for:
        models have hundreds of thousands of weights."""
        if name in self._keys and name not in self._numbered:
            return name, None
        for number in _LAYER_NUMBER.finditer(name):
            start, stop = number.span(1)
            key = name[:start] + name[stop + 1 :]
            if self._numbered.get(key) == start:
                return key, int(number[1])
        return name + _GATE, None

    def read(self, name: str, region: Region, out: Array) -> None:
        key, row = self._source(name)
        if row is None:
            self.container.read(self._tensor(key), region, out)
        else:
            self.container.read(self._tensor(key), (slice(row, row + 1), *region), out[np.newaxis])

    def chunks(self, name: str) -> list[Chunk]:
        """The chunks that hold a weight (of a stacked key, those that hold its layer)."""
        key, row = self._source(name)
        tensor = self._tensor(key)
        if row is None:
            return tensor.chunks
        layer = (slice(row, row + 1), *self.specs[name].full_region)
        return [tensor.chunk(number) for number, *_ in tensor.touching(layer)]

    def _tensor(self, key: str) -> ChunkedTensor:
        then = self._keys[key]
        if then is None:
            return self.container.tensor(self._prefix + key)
        with self._lock:
            if key not in self._halved:
                halves = (self.container.tensor(self._prefix + half) for half in (key, then))
                self._halved[key] = _stacked(*halves)
        return self._halved[key]

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raise UserError if chunks of these weights, or of all, are missing, overlap or run past their files. Reads no data."""
        for key in self._keys if names is None else dict.fromkeys(self._source(name)[0] for name in names):
            self._tensor(key)

    def common_state(self) -> dict[str, Any]:
        """What the trainer stored beside the tensors (`args`, iteration, …), classes as inert records."""
        if self.folder.has(COMMON):
            data = self.folder.get(COMMON)
            found = OpenArchive(lambda at, size: data[at : at + size], len(data), source=COMMON).pickle()
        elif COMMON_KEY in self.container.object_names:
            found = self.container.object(COMMON_KEY)
        else:
            return {}
        match found:
            case {**state} | [{**state}]:
                return state
            case _:
                raise UserError("the checkpoint's common state is not a dictionary")

    def args(self) -> Mapping[str, Any]:
        """Megatron-LM's command line, where the checkpoint carries one."""
        match self.common_state().get("args"):
            case Record() as args:
                return args.fields
            case _:
                return {}

    def close(self) -> None:
        self.container.close()


def _stacked(first: ChunkedTensor, then: ChunkedTensor) -> ChunkedTensor:
    """Two tensors as one, the second's rows after the first's."""
    rows, moved = first.shape[0], then.table().copy()
    moved[:, 0] += rows
    numbers = array("q", first.table().tobytes() + moved.tobytes())
    return ChunkedTensor((rows + then.shape[0], *first.shape[1:]), first.dtype, numbers, first.files)


class ShardedTensor(NamedTuple):
    """A weight and how ranks hold it: boxes of it, each with the rank in whose file it goes."""

    spec: TensorSpec
    chunks: tuple[tuple[Region, int], ...]


class TorchDistWriter:
    """An iteration being made, under a root with its trackers."""

    def __init__(
        self, outputs: Outputs, placed: Iterable[ShardedTensor], *, iteration: int = 0, whole_model: bool = True
    ) -> None:
        """Of a `whole_model`, layers are stacked and every module gets its empty `_extra_state`. What has only some of a
        model's tensors keeps the layer's number in each key, and holds nothing else."""
        self._folder = iteration_folder(iteration)
        self._whole_model = whole_model
        self.specs: dict[str, TensorSpec] = {}
        parts = _parts(self._noted(placed), self._located)
        common = NewObject(COMMON_KEY, rank_file(0), _common(iteration, stacked=whole_model))
        objects = chain(_extra_states(parts), [common]) if whole_model else [common]
        self._container = ContainerWriter(outputs, self._folder, _whole(self.specs.values(), parts), parts, objects)
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

    def write(self, name: str, region: Region, data: Array) -> None:
        key, row = self._located(name)
        self._container.write(key, _in_key(row, region), data if row is None else data[np.newaxis])


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
