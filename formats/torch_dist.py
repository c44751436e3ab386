"""Megatron's conventions on top of PyTorch's container, for the `torch_dist` format of megatron-core 0.19.

One name per layer and expert outside, stacked keys inside: `decoder.layers.7.mlp.linear_fc2.weight` is row 7 of the key
`decoder.layers.mlp.linear_fc2.weight`, and `decoder.layers.7.mlp.experts.3.linear_fc1.weight` is row (7, 3) of
`decoder.layers.mlp.experts.experts.linear_fc1.weight`. Checkpoints that keep the layer's number in the key read the same.
This module reads them, `torch_dist_writer.py` writes them; neither knows a model family.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from formats.chunks import Chunk, ChunkedTensor
from formats.dcp import Container
from formats.dcp_index import METADATA
from formats.errors import UserError
from formats.folder import Folder
from formats.iterations import COMMON, find_iteration
from formats.pickles import Record
from formats.spec import Array, Region, Shape, TensorSpec
from formats.torch_zip import OpenArchive

COMMON_KEY = "common_state/shard_0_1"

MOST_LAYERS = 1 << 15
MOST_WEIGHTS = 1 << 18
"""More than any model has: a damaged shape must not be counted through."""

_NOT_WEIGHTS = re.compile(r"^(optimizer|chained_\d+|rng_state|rerun_state_machine_state|dataloader)[._]")
_GATE, _UP = "_w", "_v"
"""With `singleton_local_shards`, megatron-core stores a gated projection as two tensors of these endings."""

_LAYER_NUMBER = re.compile(r"\blayers\.(\d+)\.")
_STACKED_LAYER = re.compile(r"(.*?\blayers)\.(?!\d+\.)(.+)")
_EXPERT_NUMBER = re.compile(r"\bexperts\.(\d+)\.")
_STACKED_EXPERT = re.compile(r"(.*\bexperts)\.experts\.(.+)")


class TorchDistReader:
    """An opened iteration. `specs` are its weights, one name per layer; `others` what else it holds (optimizer, …)."""

    def __init__(self, folder: Folder, *, prefix: str = "", container: Container | None = None) -> None:
        """`prefix`: see `optimizer_state`. `container`: the folder's, where it is already open."""
        self.folder = find_iteration(folder)
        self.container = container or Container(self.folder)
        self._prefix = prefix
        self.others = [name for name in self.container.tensor_names if _NOT_WEIGHTS.match(name)]
        self.specs: dict[str, TensorSpec] = {}
        self._numbered: dict[str, int] = {}
        """Keys of stacked layers, each with where in a weight's name the number of its layer is."""

        self._of_experts: set[str] = set()
        """Keys of stacked experts."""

        self._halved: dict[str, ChunkedTensor] = {}
        self._lock = threading.Lock()
        weights = dict.fromkeys(key for key in self.container.tensor_names if not _NOT_WEIGHTS.match(key))
        if prefix:
            weights = self._state_keys(weights)
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
    def files(self) -> Collection[str]:
        return self.container.files

    @property
    def has_optimizer(self) -> bool:
        return any(name.startswith(("optimizer", "chained_")) for name in self.others)

    def optimizer_state(self, prefix: str) -> TorchDistReader:
        return TorchDistReader(self.folder, prefix=prefix, container=self.container)

    def _state_keys(self, weights: Iterable[str]) -> dict[str, None]:
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
            self._add_experts(key, key, shape, dtype)
            return
        if not shape or shape[0] > MOST_LAYERS:
            raise UserError(f"`{key}` has shape {list(shape)}, whose first number should count layers")
        self._numbered[key] = stacked.end(1) + 1
        for row in range(shape[0]):
            self._add_experts(key, f"{stacked[1]}.{row}.{stacked[2]}", shape[1:], dtype)

    def _add_experts(self, key: str, name: str, shape: Shape, dtype: np.dtype[Any]) -> None:
        """Name the weights of one layer that are stored under a key: one, or one for each expert."""
        stacked = _STACKED_EXPERT.fullmatch(name)
        if not stacked:
            self._name(name, shape, dtype)
            return
        if not shape or shape[0] > MOST_LAYERS:
            raise UserError(f"`{key}` has shape {list(self._shape(key))}, in which a number should count experts")
        self._of_experts.add(key)
        for expert in range(shape[0]):
            self._name(f"{stacked[1]}.{expert}.{stacked[2]}", shape[1:], dtype)

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

    def _source(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The key that a weight is stored under, and its rows there where layers or experts are stacked. Worked out when it is
        asked for: models have hundreds of thousands of weights."""
        expert = _EXPERT_NUMBER.search(name) if self._of_experts else None
        if expert:
            folded = f"{name[: expert.start()]}experts.experts.{name[expert.end() :]}"
            if found := self._layer(folded, (int(expert[1]),)):
                return found
        return self._layer(name, ()) or (name + _GATE, ())

    def _layer(self, name: str, experts: tuple[int, ...]) -> tuple[str, tuple[int, ...]] | None:
        """The key and the rows of a weight whose expert is one of `experts`, if it is stored like that."""
        if name in self._keys and name not in self._numbered and (name in self._of_experts) == bool(experts):
            return name, experts
        for number in _LAYER_NUMBER.finditer(name):
            start, stop = number.span(1)
            key = name[:start] + name[stop + 1 :]
            if self._numbered.get(key) == start and (key in self._of_experts) == bool(experts):
                return key, (int(number[1]), *experts)
        return None

    def read(self, name: str, region: Region, out: Array) -> None:
        key, rows = self._source(name)
        self.container.read(self._tensor(key), in_key(rows, region), out[(np.newaxis,) * len(rows)])

    def chunks(self, name: str) -> list[Chunk]:
        """The chunks that hold a weight (of a stacked key, those that hold its layer)."""
        key, rows = self._source(name)
        tensor = self._tensor(key)
        if not rows:
            return tensor.chunks
        return [tensor.chunk(number) for number, *_ in tensor.touching(in_key(rows, self.specs[name].full_region))]

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


def in_key(rows: tuple[int, ...], region: Region) -> Region:
    """Return a region of a weight in the key that it is stored under, of which it is a row of a row."""
    return (*[slice(row, row + 1) for row in rows], *region)


def _stacked(first: ChunkedTensor, then: ChunkedTensor) -> ChunkedTensor:
    """Two tensors as one, the second's rows after the first's."""
    rows, moved = first.shape[0], then.table().copy()
    moved[:, 0] += rows
    numbers = array("q", first.table().tobytes() + moved.tobytes())
    return ChunkedTensor((rows + then.shape[0], *first.shape[1:]), first.dtype, numbers, first.files)
