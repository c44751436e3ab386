"""Where the state of the weights in files of ranks is stored, by where the weights are."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple, cast

import numpy as np

from formats.errors import UserError
from formats.optimizer.state import WEIGHTS_ALONE
from formats.rank_folders import RankFile
from formats.rank_names import RankTensor, tensors
from formats.rank_shards import Shard, Shards
from formats.spec import DTYPES, dtype_name
from formats.stored_arrays import StoredArray
from formats.torch_zip import OpenArchive

FP32 = DTYPES["fp32"]


class _Run(NamedTuple):
    """Bytes of a file that hold weights, and where the state of the first of them is."""

    start: int
    stop: int
    file: str
    at: int


class StateLocations:
    """Where one state (`exp_avg`, …) of the weights is stored."""

    def __init__(self, state: str) -> None:
        self.state = state
        self._runs: dict[str, list[_Run]] = {}

    def add(self, file: str, weight: RankTensor, location: tuple[str, int]) -> None:
        """Note that the state of a weight in `file`, in its order, is at this `location`: a file and an offset in bytes."""
        insort(self._runs.setdefault(file, []), _Run(weight.offset, weight.offset + weight.nbytes, *location))

    def locate(self, stored: StoredArray, dtype: np.dtype[Any]) -> StoredArray | None:
        """Return where the state of a weight or a part of it is, None where it has none."""
        runs = self._runs.get(stored.file, [])
        number = bisect_right(runs, stored.offset, key=lambda run: run.start) - 1
        if number < 0 or stored.offset + prod(stored.shape) * dtype.itemsize > runs[number].stop:
            return None
        run = runs[number]
        return StoredArray(run.file, run.at + (stored.offset - run.start) // dtype.itemsize * FP32.itemsize, stored.shape)

    def tensors(self, weights: Mapping[str, Shards]) -> dict[str, Shards]:
        """Return the state of all weights that have it, divided as they are."""
        located = {name: self._shards(name, weight) for name, weight in weights.items()}
        return {name: Shards(FP32, shards) for name, shards in located.items() if shards}

    def _shards(self, name: str, weight: Shards) -> tuple[Shard, ...]:
        """Return the shards of a weight's state; of several copies those that have it. Raises UserError where only some do."""
        copies = [[location for copy in shard.copies if (location := self.locate(copy, weight.dtype))] for shard in weight.shards]
        if not any(copies):
            return ()
        if lacking := [shard for shard, locations in zip(weight.shards, copies, strict=True) if not locations]:
            has = next(locations[0] for locations in copies if locations)
            raise UserError(
                f"`{has.file}` has `{self.state}` of its part of `{name}`, and there is none of the part in "
                f"`{lacking[0].copies[0].file}`",
                hint="the files are of two runs, or one is damaged",
            )
        return tuple(replace(shard, copies=tuple(locations)) for shard, locations in zip(weight.shards, copies, strict=True))


def parameters(file: RankFile, number: int, optimizers: int) -> list[list[RankTensor]]:
    """Return the weights of one of so many optimizers, of each model chunk, in the order in which layers were built.

    The second of two has the experts. Raises UserError for more than two.
    """
    if optimizers > 2:
        raise UserError(
            f"`{file.name}` has {optimizers} optimizers, of which only the state of two is read: the experts' and the others'",
            hint=WEIGHTS_ALONE,
        )
    chunks = [list(tensors(model, file)) for model in file.models]
    return [[weight for weight in chunk if optimizers == 1 or weight.is_expert == (number == 1)] for chunk in chunks]


def state_tensor(archive: OpenArchive, record: Any, name: str, file: str) -> RankTensor:
    """Return a tensor of optimizer state. Raises UserError unless it is fp32."""
    tensor = RankTensor.of(archive, record, name, file)
    if tensor.dtype != FP32:
        raise UserError(
            f"`{name}` in `{file}` is {dtype_name(tensor.dtype)}, and only optimizer state in fp32 is read",
            hint=WEIGHTS_ALONE,
        )
    return tensor


def optimizers_of(file: RankFile) -> Iterator[Mapping[Any, Any]]:
    """Yield the state of every optimizer in a file. Raises UserError where it has no parameter groups."""
    for each in as_sequence(file.state.get("optimizer")):
        outer = as_dict(each)
        inner = as_dict(outer.get("optimizer", outer))
        if not isinstance(inner.get("param_groups"), list):
            raise UserError(f"`optimizer` in `{file.name}` has no `param_groups`", hint="the file is damaged")
        yield {**outer, **inner}


def as_dict(value: Any) -> Mapping[Any, Any]:
    """Return a dictionary, an empty one for other objects."""
    return cast("dict[Any, Any]", value) if isinstance(value, dict) else {}


def as_sequence(value: Any) -> Sequence[Any]:
    """Return a list or tuple, any other object as the only item of one."""
    return cast("Sequence[Any]", value) if isinstance(value, (list, tuple)) else [value]
