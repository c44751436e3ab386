"""State of the distributed optimizer in `distrib_optim.pt`: flat tensors, one for each buffer of weights.

A buffer has the weights of one model chunk and dtype, and is one storage in `model_optim_rng.pt`: the offsets of weights in it
say where they are in the flat tensors, which leave out the padding at the end of every bucket. Layout: megatron-core 0.19's
`optimizer/distrib_optimizer.py` (`get_parameter_state_dp_zero`, `_compute_per_buffer_param_layout`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np

from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.optimizer.state import STATES
from formats.optimizer.state_locations import FP32, StateLocations, as_dict, as_sequence, parameters, state_tensor
from formats.pickles import Global
from formats.rank_folders import OPTIMIZER_FILE, RankFile, args_of
from formats.rank_names import EMBEDDING, OUTPUT, RankTensor
from formats.spec import is_size
from formats.torch_zip import DTYPE_OF, OpenArchive

_ALIGNMENT = 64  # elements to a multiple of which megatron-core moves the start of every weight
_SMALLEST_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000  # megatron-core's bucket sizes where none is set, in elements


class _Buffer(NamedTuple):
    """The state of one buffer: its key in the file, the dtype of its weights, and its flat tensors."""

    key: Any
    dtype: np.dtype[Any]
    size: int
    tensors: Mapping[str, RankTensor]


class _Weight(NamedTuple):
    """A weight and where it starts in its storage, in elements."""

    start: int
    tensor: RankTensor

    @property
    def stop(self) -> int:
        return self.start + prod(self.tensor.shape)


def add(locations: Mapping[str, StateLocations], folder: Folder, file: RankFile, ep: int) -> None:
    """Add where the state of a rank's weights is; `ep` is its expert-parallel rank.

    Raises UserError for state that is missing or does not fit the weights.
    """
    name = f"{file.folder}{OPTIMIZER_FILE}"
    if not folder.has(name):
        raise UserError(f"`{folder.label}` has no `{name}`", hint="copy the checkpoint again: every rank has such a file")
    archive = OpenArchive.in_place(folder, name)
    optimizers = as_sequence(archive.pickle())
    for number, state in enumerate(optimizers):
        if state is None and number == 0 and ep > 0:  # the file of expert-parallel rank 0 has it
            continue
        storages = [_storages(chunk) for chunk in parameters(file, number, len(optimizers))]
        _add_optimizer(locations, file, storages, list(_buffers(archive, state, name)), name)


def _add_optimizer(
    locations: Mapping[str, StateLocations],
    file: RankFile,
    chunks: Sequence[list[list[_Weight]]],
    buffers: Sequence[_Buffer],
    name: str,
) -> None:
    """Add the state of one optimizer. Its buffers are in the order of the model chunks, several of which a chunk may have."""
    first = 0
    for buffer in buffers:
        fitting = (
            (number, storage, padding)
            for number in range(first, len(chunks))
            for storage in chunks[number]
            if storage[0].tensor.dtype == buffer.dtype and (padding := _paddings(storage, buffer.size, args_of(file))) is not None
        )
        match = next(fitting, None)
        if match is None:
            raise UserError(
                f"buffer `{buffer.key}` in `{name}` has {buffer.size} elements, and weights in `{file.name}` that fill as many "
                "are not to be found",
                hint="the files are of two runs, or the sizes of buckets are not known: load it in Megatron-LM and save it with "
                "`--ckpt-format torch_dist`",
            )
        first, storage, paddings = match
        chunks[first].remove(storage)
        for weight, padding in zip(storage, paddings, strict=True):
            for state, flat in buffer.tensors.items():
                locations[state].add(file.name, weight.tensor, (name, flat.offset + (weight.start - padding) * FP32.itemsize))


def _storages(weights: Sequence[RankTensor]) -> list[list[_Weight]]:
    """Return the weights by their storage, in the order in which they are in it."""
    storages: dict[str, list[_Weight]] = {}
    for weight in weights:
        start = (weight.offset - weight.base) // weight.dtype.itemsize
        storages.setdefault(weight.key, []).append(_Weight(start, weight))
    return [sorted(storage, key=lambda weight: weight.start) for storage in storages.values()]


def _buffers(archive: OpenArchive, state: Any, name: str) -> Iterator[_Buffer]:
    """Yield the buffers in an optimizer's state."""
    if state is None:
        raise UserError(f"`{name}` has no state of one of its optimizers", hint="use an earlier iteration")
    buffers = as_dict(state)
    if buffers.get("buckets_coalesced") is not True:
        raise UserError(
            f"`{name}` has a tensor for each bucket, as Megatron-LM wrote before February 2024, which is not supported",
            hint="load it in Megatron-LM with `--ckpt-convert-update-legacy-dist-opt-format`, which saves it in today's layout",
        )
    for number in sorted(key for key in buffers if is_size(key)):
        for dtypes, flat in as_dict(buffers[number]).items():
            yield _buffer(archive, (number, dtypes), as_dict(flat), name)


def _buffer(archive: OpenArchive, key: tuple[int, Any], flat: Mapping[Any, Any], name: str) -> _Buffer:
    match key[1]:
        case (Global(name=written), Global(name=gradients)) if written in DTYPE_OF:
            shown = f"{key[0]}: {written}, {gradients}"
        case _:
            raise UserError(f"buffer {key[0]} in `{name}` is of weights in a dtype that is not read")
    if missing := [state for state in STATES if state not in flat]:
        raise UserError(f"buffer `{shown}` in `{name}` has no `{missing[0]}`", hint="the file is damaged")
    tensors = {state: state_tensor(archive, flat[state], state, name) for state in STATES}
    sizes = {prod(tensor.shape) for tensor in tensors.values()}
    size = flat.get("numel_unpadded", max(sizes))
    if sizes != {size}:
        raise UserError(
            f"buffer `{shown}` in `{name}` has tensors of {sorted(sizes)} elements, and should have {format_untrusted(size)}"
        )
    return _Buffer(shown, DTYPE_OF[written], size, tensors)


def _paddings(storage: Sequence[_Weight], size: int, args: Mapping[str, Any]) -> list[int] | None:
    """Return how much padding precedes each weight in its storage, in elements; None where so much state is not that storage's.

    Padding is told by what it adds to alignment; where it adds nothing, by the sizes of buckets.
    """
    for bucket in (None, _bucket_size(args)):
        paddings = list(_padding(storage, bucket, args.get("untie_embeddings_and_output_weights") is False))
        if storage[-1].stop - paddings[-1] == size:
            return paddings
    return None


def _padding(storage: Sequence[_Weight], bucket: int | None, tied: bool) -> Iterator[int]:
    """Yield the padding before each weight. A tied embedding has a bucket of its own, which ends the one before it."""
    total = opened = storage[0].start
    yield total
    for before, weight in pairwise(storage):
        aligned = -(-before.stop // _ALIGNMENT) * _ALIGNMENT
        full = bucket is not None and before.stop - opened >= bucket
        if full or weight.start > aligned:
            shared = tied and weight.tensor.name in (EMBEDDING, OUTPUT)
            total += weight.start - (aligned if shared and not full else before.stop)
            opened = weight.start
        yield total


def _bucket_size(args: Mapping[str, Any]) -> int:
    given, ranks = args.get("ddp_bucket_size"), args.get("data_parallel_size")
    if isinstance(given, int):
        return given
    return max(_SMALLEST_BUCKET, _BUCKET_PER_RANK * ranks) if isinstance(ranks, int) else _SMALLEST_BUCKET
