"""Names in the state dict of a rank, which count its own layers and experts, and how tensor-parallel ranks divide a weight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from formats.errors import UserError
from formats.rank_folders import RankFile, args_of
from formats.spec import Shape, is_size
from formats.stored_arrays import StoredArray
from formats.torch_zip import OpenArchive, contiguous_strides

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
COLUMNS, ROWS = 0, 1
"""The axes that megatron-core's ColumnParallelLinear and RowParallelLinear divide."""

GATED = "linear_fc1."

_LAYER = re.compile(r"((?:decoder|encoder)\.layers\.)([0-9]{1,9})\.(.+)")
_SEQUENTIAL = re.compile(r"(.*\bmlp\.experts\.)local_experts\.([0-9]{1,9})\.(.+)")
_GROUPED = re.compile(r"(.*\bmlp\.experts\.)(linear_fc[12])\.(weight|bias)([0-9]{1,9})(_\w)?")
_TRANSPOSED = re.compile(r"(.*\bmlp\.experts\.)weight([12])")

_DIVIDED = {
    COLUMNS: r"(linear_qkv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj|linear_fc1|word_embeddings|output_layer|eh_proj)"
    r"\.(weight|bias)|core_attention\.softmax_offset",
    ROWS: r"(linear_proj|linear_fc2)\.weight",
}
_WHOLE = (
    r"\w*norm\w*\.(weight|bias)|layer_norm_(weight|bias)|router\.\w+|(linear_proj|linear_fc2)\.bias|gate_weight|"
    r"position_embeddings\.weight|linear_(q|kv)_down_proj\.weight|alpha_[pn]|beta|eps"
)


class Piece(NamedTuple):
    """What one rank holds of a weight: [rows, columns], stored [columns, rows] if `transposed`."""

    shape: Shape
    dtype: np.dtype[Any]
    stored: StoredArray
    transposed: bool = False


class RankTensor(NamedTuple):
    """A contiguous tensor in a file of a rank: its name there, the key and byte offset of its storage, and its own offset."""

    name: str
    shape: Shape
    dtype: np.dtype[Any]
    key: str
    base: int
    offset: int

    @classmethod
    def of(cls, archive: OpenArchive, record: Any, name: str, file: str) -> RankTensor:
        """Return the tensor that a record describes. Raises UserError for one that is not contiguous, and for other objects."""
        tensor, offset = archive.tensor(record)
        if tensor.strides != contiguous_strides(tensor.shape) and prod(tensor.shape) > 1:
            raise UserError(f"`{name}` in `{file}` has strides {list(tensor.strides)}, which is not supported")
        return cls(name, tensor.shape, tensor.dtype, tensor.key, offset - tensor.start * tensor.dtype.itemsize, offset)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def is_expert(self) -> bool:
        return bool(re.search(r"\bexperts\.", self.name))


def tensors(state: Mapping[str, Any], file: RankFile) -> Iterator[RankTensor]:
    """Yield the tensors of a model chunk, without objects."""
    for name, record in state.items():
        if not name.endswith("_extra_state"):
            yield RankTensor.of(file.archive, record, name, file.name)


def count_layers(state: Mapping[str, Any], file: str) -> int:
    """Return how many layers a model chunk has. Raises UserError where one is missing."""
    numbers = {int(match[2]) for name in state if (match := _LAYER.fullmatch(name))}
    if numbers != set(range(len(numbers))):
        raise UserError(f"`{file}` has layers {sorted(numbers)[:8]}, which should count from 0", hint="the file is damaged")
    return len(numbers)


def partition_dim(name: str, ranks: int) -> int | None:
    """Return the axis along which tensor-parallel ranks divide a weight; None where each has it whole."""
    if ranks == 1:
        return None
    for axis, pattern in _DIVIDED.items():
        if re.search(rf"(^|\.)({pattern})$", name):
            return axis
    if re.search(rf"(^|\.|_)({_WHOLE})$", name):
        return None
    raise UserError(
        f"`{name}` is of a layer whose division over tensor-parallel ranks is not known here",
        hint="load it in Megatron-LM and save it with `--ckpt-format torch_dist`",
    )


def second(name: str) -> str:
    """Return the weight that multiplies what `linear_fc1` of a name returns."""
    return re.sub(r"linear_fc1\.(weight|bias)$", "linear_fc2.weight", name)


def pieces(state: Mapping[str, Any], file: RankFile, *, first: int, ep: int) -> Iterator[tuple[str, Piece]]:
    """Yield the weights of a model chunk under their names in the whole model, and where they are stored.

    `first` is the number of the chunk's first layer, `ep` the expert-parallel rank.
    """
    experts = _count_experts(state, file)
    for tensor in tensors(state, file):
        layer = _LAYER.fullmatch(tensor.name)
        numbered = f"{layer[1]}{first + int(layer[2])}.{layer[3]}" if layer else tensor.name
        piece = Piece(tensor.shape, tensor.dtype, StoredArray(file.name, tensor.offset, tensor.shape))
        if match := _TRANSPOSED.fullmatch(numbered):
            yield from _transposed(match, piece, file, ep)
            continue
        yield with_expert(numbered, ep * experts), piece


def _count_experts(state: Mapping[str, Any], file: RankFile) -> int:
    """Return how many experts a model chunk has. Raises UserError where one is missing, or their number is not that in `args`."""
    numbers = {int(match[group]) for name in state for match, group in _numbered(name)}
    if numbers != set(range(len(numbers))):
        raise UserError(f"`{file.name}` has experts {sorted(numbers)[:8]}, which should count from 0", hint="the file is damaged")
    expected = _local_experts(file)
    if numbers and expected not in (0, len(numbers)):
        raise UserError(
            f"`{file.name}` has {len(numbers)} experts in a layer, and its `args` say {expected} for each rank",
            hint="the file is of another run",
        )
    return len(numbers)


def _numbered(name: str) -> Iterator[tuple[re.Match[str], int]]:
    if match := _SEQUENTIAL.fullmatch(name):
        yield match, 2
    if match := _GROUPED.fullmatch(name):
        yield match, 4


def with_expert(name: str, first: int = 0) -> str:
    """Return the name with the expert's number in the whole model, where `first` is that of expert 0 here.

    >>> with_expert("mlp.experts.linear_fc1.weight3"), with_expert("mlp.experts.local_experts.3.linear_fc1.weight", 4)
    ('mlp.experts.3.linear_fc1.weight', 'mlp.experts.7.linear_fc1.weight')
    """
    if match := _SEQUENTIAL.fullmatch(name):
        return f"{match[1]}{first + int(match[2])}.{match[3]}"
    if match := _GROUPED.fullmatch(name):
        return f"{match[1]}{first + int(match[4])}.{match[2]}.{match[3]}{match[5] or ''}"
    return name


def _transposed(match: re.Match[str], piece: Piece, file: RankFile, ep: int) -> Iterator[tuple[str, Piece]]:
    """Yield the experts of megatron-core's GroupedMLP (up to 0.15): `weight1` is [hidden, experts · rows] in name, and in memory
    [experts, hidden, rows]; `weight2` [experts · columns, hidden], which is [experts, columns, hidden]."""
    here = _local_experts(file)
    axis = 1 if match[2] == "1" else 0
    if not here or len(piece.shape) != 2 or piece.shape[axis] % here:
        raise UserError(f"`{match[0]}` has shape {list(piece.shape)}, and `args` in `{file.name}` do not say of how many experts")
    size = piece.shape[axis] // here
    inner = (piece.shape[0], size) if axis else (size, piece.shape[1])
    for expert in range(here):
        offset = piece.stored.offset + expert * prod(inner) * piece.dtype.itemsize
        stored = piece.stored._replace(offset=offset, shape=inner)
        yield f"{match[1]}{ep * here + expert}.linear_fc{match[2]}.weight", Piece(inner[::-1], piece.dtype, stored, True)


def _local_experts(file: RankFile) -> int:
    """Return how many experts a rank has, 0 where `args` do not say."""
    args = args_of(file)
    experts: Any = args.get("num_experts")
    parallel: Any = args.get("expert_model_parallel_size") or 1
    known = is_size(experts) and is_size(parallel) and experts % parallel == 0
    return int(experts // parallel) if known else 0
