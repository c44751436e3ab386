"""Read the `torch_dist` format of megatron-core 0.19: Megatron's conventions on top of PyTorch's container.

Tensors have one name per layer and expert, while the files store stacked keys: `decoder.layers.7.mlp.linear_fc2.weight` is row 7
of the key `decoder.layers.mlp.linear_fc2.weight`, and `decoder.layers.7.mlp.experts.3.linear_fc1.weight` is row (7, 3) of
`decoder.layers.mlp.experts.experts.linear_fc1.weight`. Checkpoints with the layer's number in the key read the same. Writing is
left to `torch_dist_writer.py`, model families to the converter.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np

from formats.chunks import Chunk, ChunkedTensor
from formats.container import Container
from formats.dcp import DcpContainer
from formats.dcp_index import METADATA
from formats.errors import TransientError, UserError
from formats.folder import FileRef, Folder
from formats.iterations import COMMON, find_iteration
from formats.lightning import in_megatrons_words
from formats.object_names import ObjectName
from formats.pickles import Record
from formats.rank_names import with_expert
from formats.spec import Array, Region, Shape, TensorSpec
from formats.torch_zip import OpenArchive

COMMON_STATE = ObjectName("common_state")
COMMON_KEY = str(COMMON_STATE)

MOST_LAYERS = 1 << 15
MOST_WEIGHTS = 1 << 18
"""Upper bounds, so that a corrupt shape cannot make us enumerate billions of names."""

_NOT_WEIGHTS = re.compile(r"^(optimizer|chained_\d+|rng_state|rerun_state_machine_state|dataloader)[._]")
ROOTS = ("model.module.", "module.", "model.")
"""What wrappers put before the names of all weights: Megatron-FSDP's, NeMo 2's, and NeMo 1's and `torch_dcp`'s."""

_OF_COMMON = ("args", "iteration", "checkpoint_version", "num_floating_point_operations_so_far")
_SCHEDULER = "opt_param_scheduler"
"""Objects that checkpoints without a common state have instead of one; of the scheduler one for each of its fields."""

GATE, UP = "_w", "_v"
"""Suffixes of the two tensors that megatron-core stores for a gated projection with `singleton_local_shards`."""

_LAYER_NUMBER = re.compile(r"\blayers\.(\d+)\.")
_STACKED_LAYER = re.compile(r"(.*?\blayers)\.(?!\d+\.)(.+)")
_EXPERT_NUMBER = re.compile(r"\bexperts\.(\d+)\.")
_STACKED_EXPERT = re.compile(r"(.*\bexperts)\.experts\.(.+)")


class TorchDistReader:
    """An opened iteration; see `MegatronReader`."""

    settings: FileRef | None = None

    def __init__(self, folder: Folder, *, prefix: str = "", container: Container | None = None) -> None:
        """`prefix`: see `state`. `container`: the folder's, where it is already open."""
        self.folder = find_iteration(folder)
        self.container = container or DcpContainer(self.folder)
        self._prefix = prefix
        self.others = [name for name in self.container.tensor_names if _NOT_WEIGHTS.match(name)]
        self.specs: dict[str, TensorSpec] = {}
        self._numbered: dict[str, int] = {}
        """Keys of stacked layers, with the position of the layer's number in a weight's name."""

        self._of_experts: set[str] = set()
        """Keys of stacked experts."""

        self._halved: dict[str, ChunkedTensor] = {}
        self._lock = threading.Lock()
        weights = dict.fromkeys(key for key in self.container.tensor_names if not _NOT_WEIGHTS.match(key))
        self.root = root_of(weights)
        self._spelled = {with_expert(name): name for key in weights if (name := key.removeprefix(self.root))}
        """The weights, and how their keys spell them: state dicts have names of their own for experts."""

        if len(self._spelled) != len(weights):
            raise UserError(f"`{METADATA}` names experts in two ways", hint="the checkpoint was mixed from two")
        weights = dict.fromkeys(self._spelled)
        if prefix:
            weights = self._state_keys(weights)
        halves = {key: key.removesuffix(GATE) + UP for key in weights if key.endswith(GATE)}
        halves = {gate: up for gate, up in halves.items() if up in weights}
        ups = set(halves.values())
        self._keys = {key: halves.get(key) for key in weights if key not in ups}
        """Keys without root and prefix, each with the key of the second half of a gated projection, if any."""

        for key in (key for key in self._keys if key not in halves):
            self._add(key)
        for gate, up in halves.items():
            self._add_halves(gate, up)

    @property
    def files(self) -> Collection[str]:
        return self.container.files

    @property
    def index_files(self) -> Collection[str]:
        return self.container.index_files

    @property
    def has_optimizer(self) -> bool:
        names = chain(self.others, self.container.object_names)
        return any(name.startswith(("optimizer", "chained_")) for name in names)

    @property
    def contents(self) -> Collection[str]:
        """See `MegatronReader.contents`."""
        stored = {
            name.partition("/")[0].partition(".")[0] for names in (self.others, self.container.object_names) for name in names
        }
        return stored | self.common_state().keys()

    def state(self, prefix: str) -> TorchDistReader:
        """Return a reader of the optimizer state that has the names and shapes of weights.

        `prefix` precedes the weight's key: `optimizer.state.exp_avg.` selects the first moment.
        """
        return TorchDistReader(self.folder, prefix=prefix, container=self.container)

    def _state_keys(self, weights: Iterable[str]) -> dict[str, None]:
        shape, others = self.container.shape, set(self.others)
        kept = (key for key in weights if self._stored_key(key) in others)
        return dict.fromkeys(key for key in kept if self._shape(key) == shape(f"{self.root}{self._spelled[key]}"))

    def _stored_key(self, key: str) -> str:
        return f"{self._prefix}{self.root}{self._spelled[key]}"

    @property
    def keys(self) -> Collection[str]:
        """The keys of the weights as they are stored, in their order in the index, without `root`; halves separately."""
        return [self._spelled[part] for gate, up in self._keys.items() for part in (gate, up) if part]

    def _shape(self, key: str) -> Shape:
        return self.container.shape(self._stored_key(key))

    def _dtype(self, key: str) -> np.dtype[Any]:
        return self.container.dtype(self._stored_key(key))

    def _add(self, key: str) -> None:
        shape, dtype = self._shape(key), self._dtype(key)
        stacked = _STACKED_LAYER.fullmatch(key)
        if not stacked:
            self._add_experts(key, key, shape, dtype)
            return
        if not shape or shape[0] > MOST_LAYERS:
            raise UserError(f"`{key}` has shape {list(shape)}, whose first size should be the number of layers")
        self._numbered[key] = stacked.end(1) + 1
        of_layer = shape[1:]
        for row in range(shape[0]):
            self._add_experts(key, f"{stacked[1]}.{row}.{stacked[2]}", of_layer, dtype)

    def _add_experts(self, key: str, name: str, shape: Shape, dtype: np.dtype[Any]) -> None:
        """Name the weights of one layer that are stored under a key: one, or one for each expert."""
        stacked = _STACKED_EXPERT.fullmatch(name)
        if not stacked:
            self._add_spec(name, shape, dtype)
            return
        if not shape or shape[0] > MOST_LAYERS:
            raise UserError(f"`{key}` has shape {list(self._shape(key))}, in which a number should count experts")
        self._of_experts.add(key)
        of_expert = shape[1:]  # one object for all of them
        for expert in range(shape[0]):
            self._add_spec(f"{stacked[1]}.{expert}.{stacked[2]}", of_expert, dtype)

    def _add_halves(self, gate: str, up: str) -> None:
        shape, other = self._shape(gate), self._shape(up)
        if other != shape or not shape:
            raise UserError(f"`{gate}` has shape {list(shape)}, `{up}` has {list(other)}")
        self._add_spec(gate.removesuffix(GATE), (2 * shape[0], *shape[1:]), self._dtype(gate))

    def _add_spec(self, name: str, shape: Shape, dtype: np.dtype[Any]) -> None:
        if name in self.specs:
            raise UserError(f"`{name}` is stored twice: stacked with its layers and on its own")
        if len(self.specs) >= MOST_WEIGHTS:
            raise UserError(f"`{METADATA}` describes more than {MOST_WEIGHTS} weights", hint="the checkpoint is damaged")
        self.specs[name] = TensorSpec(name, shape, dtype)

    def _key_and_rows(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return the key of a weight, and its rows there if layers or experts are stacked.

        Computed on demand: models have hundreds of thousands of weights.
        """
        expert = _EXPERT_NUMBER.search(name) if self._of_experts else None
        if expert:
            folded = f"{name[: expert.start()]}experts.experts.{name[expert.end() :]}"
            if folded_key := self._layer(folded, (int(expert[1]),)):
                return folded_key
        return self._layer(name, ()) or (name + GATE, ())

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
        key, rows = self._key_and_rows(name)
        self.container.read(self._tensor(key), in_key(rows, region), out[(*(np.newaxis,) * len(rows), ...)])

    def chunks(self, name: str) -> list[Chunk]:
        """The chunks that hold a weight (of a stacked key, those that hold its layer)."""
        key, rows = self._key_and_rows(name)
        tensor = self._tensor(key)
        if not rows:
            return tensor.chunks
        return [tensor.chunk(number) for number, *_ in tensor.overlapping(in_key(rows, self.specs[name].full_region))]

    def _tensor(self, key: str) -> ChunkedTensor:
        then = self._keys[key]
        if then is None:
            return self.container.tensor(self._stored_key(key))
        with self._lock:
            if key not in self._halved:
                halves = (self.container.tensor(self._stored_key(half)) for half in (key, then))
                self._halved[key] = _concatenated(*halves)
        return self._halved[key]

    def check(self, names: Iterable[str] | None = None) -> None:
        """See `MegatronReader.check`."""
        for key in self._keys if names is None else dict.fromkeys(self._key_and_rows(name)[0] for name in names):
            self._tensor(key)

    def common_state(self) -> dict[str, Any]:
        """See `MegatronReader.common_state`. That of NeMo is its trainer's, of which the step and the optimizer are returned. It
        may name any class: where it is not readable, nothing is returned, and `unread_trainer` says why."""
        if not self._has_common():
            return self._objects_of_common()
        if self.root:
            return self._trainer()[0]
        match self._common():
            case {**fields} | [{**fields}]:
                return fields
            case _:
                raise UserError("the checkpoint's common state is not a dictionary")

    def unread_trainer(self) -> str:
        """Return why the state of NeMo's trainer is not read; empty where it is, and in checkpoints of other programs."""
        return self._trainer()[1] if self.root and self._has_common() else ""

    def _trainer(self) -> tuple[dict[str, Any], str]:
        """Return what is read of the state of NeMo's trainer, or why it is not."""
        try:
            return in_megatrons_words(self._common()), ""
        except TransientError:
            raise
        except UserError as error:
            return {}, str(error.args[0])

    def _common(self) -> Any:
        archive = self.common_archive()
        return archive.pickle() if archive else None

    def _has_common(self) -> bool:
        return self.folder.has(COMMON) or COMMON_KEY in self.container.object_names

    def _objects_of_common(self) -> dict[str, Any]:
        names, start = set(self.container.object_names), f"{_SCHEDULER}."
        fields = sorted(name for name in names if name.startswith(start))
        scheduler = {name.removeprefix(start): self.container.archive(name).pickle() for name in fields}
        state = {name: self.container.archive(name).pickle() for name in _OF_COMMON if name in names}
        return {**state, **({_SCHEDULER: scheduler} if scheduler else {})}

    def common_archive(self) -> OpenArchive | None:
        """Open what holds the common state and its tensors, None where there is no such state."""
        if self.folder.has(COMMON):
            return OpenArchive.of(self.folder, COMMON)
        return self.container.archive(COMMON_KEY) if COMMON_KEY in self.container.object_names else None

    def args(self) -> Mapping[str, Any]:
        """See `MegatronReader.args`."""
        match self.common_state().get("args"):
            case Record() as args:
                return args.fields
            case _:
                return {}

    def close(self) -> None:
        self.container.close()


def root_of(keys: Iterable[str]) -> str:
    """Return what all names of weights begin with: the attributes through which a wrapper holds the model; mostly nothing.

    >>> root_of(["model.module.embedding.word_embeddings.weight", "model.module.decoder.final_layernorm.weight"])
    'model.module.'
    """
    names = list(keys)
    return next((root for root in ROOTS if names and all(name.startswith(root) for name in names)), "")


def in_key(rows: tuple[int, ...], region: Region) -> Region:
    """Return a region of a weight in the key that it is stored under, of which it is a row of a row."""
    return (*[slice(row, row + 1) for row in rows], *region)


def _concatenated(first: ChunkedTensor, then: ChunkedTensor) -> ChunkedTensor:
    """Concatenate two tensors along dimension 0."""
    rows, moved = first.shape[0], then.table().copy()
    moved[:, 0] += rows
    numbers = array("q", first.table().tobytes() + moved.tobytes())
    return ChunkedTensor((rows + then.shape[0], *first.shape[1:]), first.dtype, numbers, first.files)
