"""Undo what megatron-core 0.5 to 0.14 did to the optimizer state of its distributed optimizer (`fully_sharded_model_space`).

A key is cut into a grid of equal shards, those of the weight, and each is stored flat: a key of shape S has the stored shape
`[grid…, elements of a shard]`, and `.metadata` notes S. Data-parallel ranks hold runs of a shard, so chunks end anywhere in its
last axis. Keys of a model with experts begin with the number of their optimizer. Source: megatron-core 0.8's
`dist_checkpointing/strategies/resharding.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

import numpy as np

from formats.chunks import ChunkedTensor
from formats.container import Container
from formats.dcp import DcpContainer
from formats.errors import UserError
from formats.optimizer.flat_shards import Flat, FlatShards, FlatTensor, sharded
from formats.spec import Array, Shape, TensorSpec

_STATE = re.compile(r"(?:chained_\d+\.)?(optimizer\.state\..+)")


def unflattened(container: Container) -> Container:
    """Return a container that has optimizer state in the shapes of the weights' keys, under names without an optimizer's number.

    It is the one given where all state is stored like that. Raises UserError where grid, shape and shards do not agree.
    """
    flattened: Mapping[str, Shape] = container.flattened if isinstance(container, DcpContainer) else {}
    names = {name: match[1] for name in container.tensor_names if (match := _STATE.fullmatch(name))}
    changed = {name: key for name, key in names.items() if name in flattened or name != key}
    if not changed:
        return container
    labels, tensors, sources = list(changed), dict[str, ChunkedTensor](), dict[str, Flat]()
    for number, (name, key) in enumerate(changed.items()):
        if key in tensors or names.get(key) == key != name:
            raise UserError(f"`{key}` is stored by two optimizers", hint="the checkpoint is damaged or was mixed from two")
        stored = tensors[key] = container.tensor(name)
        if name in flattened:
            sources[name] = FlatTensor(container, stored)
            bounds = _shards(name, flattened[name], stored)
            runs = np.stack([np.full(len(bounds), number), np.arange(len(bounds)) * stored.shape[-1]], axis=1)
            tensors[key] = sharded(TensorSpec(key, flattened[name], stored.dtype), bounds, runs, labels)
    return FlatShards(container, tensors, sources, labels)


def _shards(name: str, shape: Shape, stored: ChunkedTensor) -> Array:
    """Return offsets and sizes of the shards of a key, [shards, 2 * dims], in the order in which they are stored."""
    *grid, count = stored.shape or (0,)
    fits = len(grid) == len(shape) and all(parts and size % parts == 0 for size, parts in zip(shape, grid, strict=True))
    shard = [size // parts for size, parts in zip(shape, grid, strict=True)] if fits else []
    if not fits or prod(shard) != count or not count or prod(grid) > len(stored):
        raise UserError(
            f"`{name}` of shape {list(shape)} is stored as {list(stored.shape)}, which are not shards of it, each flat",
            hint="the checkpoint is damaged",
        )
    starts = np.indices(grid, np.int64).reshape(len(grid), -1).T * np.array(shard, np.int64)
    return np.concatenate([starts, np.broadcast_to(np.array(shard, np.int64), starts.shape)], axis=1)
