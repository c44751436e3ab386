"""Optimizer state that ranks keep in flat buffers, as state in the names and shapes of the weights.

`buckets.py` and `gathered.py` say what buffers there are, `rank_buffers.py` what each holds. That the order of the parameters is
right is known where sizes and seams come out; the proof is that fp32 weights round to the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations
from math import prod
from typing import Any, NamedTuple, cast

import numpy as np

from formats.chunks import ChunkedTensor
from formats.errors import UserError, format_untrusted
from formats.optimizer import groups, model_space
from formats.optimizer.flat_shards import Flat, FlatShards, sharded
from formats.optimizer.parameters import (
    Parameter,
    elements,
    expert_tensor_parallel_size,
    read_parameters,
    tensor_parallel_size,
)
from formats.optimizer.rank_buffers import Buffer, Optimizer, StateLocation, divide, locate, locate_experts
from formats.optimizer.registration import Order, blocks, orders
from formats.optimizer.state import STATES, OptimizerState
from formats.spec import DTYPES, Array, Reader, TensorSpec, is_size
from formats.torch_dist import TorchDistReader

Groups = Mapping[int, Sequence[Buffer]]
"""For each group of data-parallel ranks the buffer of each of its model chunks."""


Source = Callable[[str, str], Flat | None]
"""Gives what holds a state of a run's label, None where that state is not kept."""


_SHARDS = "tensor_parallel_num_weight_shards"
_MOST_RANKS = 1 << 20
_MOST_FROZEN = 6
"""The most names of biases of which any may be frozen: all combinations of them are tried."""


class Model(NamedTuple):
    """The parameters of a model. Those of experts are apart where they have an optimizer of their own."""

    ranks: int
    expert_ranks: int
    dense: list[Parameter]
    experts: list[Parameter]


def read_model(reader: TorchDistReader, *, apart: bool) -> Model:
    """Return the parameters of the model that `reader` reads; `apart`: experts have an optimizer of their own."""
    keys, container = list(reader.keys), reader.container
    ranks = tensor_parallel_size(container, reader.root)
    expert_ranks = expert_tensor_parallel_size(container, reader.root, keys) if apart else ranks
    read = read_parameters(container, reader.root, keys, ranks=ranks, expert_ranks=expert_ranks)
    of_experts = [parameter for parameter in read if apart and parameter.expert >= 0]
    return Model(ranks, expert_ranks, [weight for weight in read if not apart or weight.expert < 0], of_experts)


def read(reader: TorchDistReader, optimizers: Mapping[str, Groups], source: Source) -> OptimizerState:
    """Return the state in the buffers of a model's optimizers, by their numbers in names, an empty one where there is one.

    Raises UserError where the buffers do not come out in any order that a model may have.
    """
    numbers = sorted(optimizers)
    hyper = {number: groups.of_ranks(reader, number, sorted(optimizers[number])) for number in numbers}
    of_experts = [number for number in numbers if len(numbers) > 1 and groups.are_of_experts(hyper[number])]
    dense = _merged(optimizers[number] for number in numbers if number not in of_experts)
    experts = _merged(optimizers[number] for number in of_experts)
    kind = model_space.kind(model_space.chained(reader.common_state().get("optimizer")))
    loss_scale = groups.loss_scale(reader, numbers[0], min(optimizers[numbers[0]]))
    return OptimizerState(kind, _states(reader, dense, experts, source), list(hyper.values()), loss_scale)


def _states(reader: TorchDistReader, dense: Groups, experts: Groups, source: Source) -> dict[str, Reader]:
    model = read_model(reader, apart=bool(experts))
    _check_settings(reader.args(), model.ranks, dense)
    locations = _locations(model, dense, experts, grouped=reader.args().get("moe_grouped_gemm"))
    labels, runs = _runs(reader, locations)
    kept = {state: sources for state in STATES if (sources := _sources(state, labels, source))}
    return {state: _reader(reader, state, runs, labels, sources) for state, sources in kept.items()}


def _check_settings(args: Mapping[str, Any], ranks: int, dense: Groups) -> None:
    """Raise UserError where Megatron-LM's command line contradicts that the state is of all ranks, each with its parameters."""
    shards = args.get(_SHARDS)
    if shards not in (None, ranks):
        raise UserError(
            f"`{_SHARDS}` is {format_untrusted(shards)}, and the weights are divided over {ranks} ranks: such state is not read",
            hint="load it in Megatron and save it with `--dist-ckpt-optim-fully-reshardable`",
        )
    sizes: list[Any] = [args.get(f"{axis}_model_parallel_size") for axis in ("tensor", "pipeline")]
    if all(is_size(size) and size < _MOST_RANKS for size in sizes) and prod(cast("list[int]", sizes)) != len(dense):
        raise UserError(
            f"`args` say TP {sizes[0]} and PP {sizes[1]}, and {len(dense)} groups of ranks have optimizer state",
            hint="the checkpoint is incomplete or was mixed from two: copy it again",
        )


def _locations(model: Model, dense: Groups, experts: Groups, *, grouped: object) -> list[StateLocation]:
    """Return where every weight is on every rank, in the first order of registration in which all sizes come out."""
    refusal: UserError | None = None
    for trained in _trained(model):
        for order in orders([*trained.dense, *trained.experts], grouped=grouped if isinstance(grouped, bool) else None):
            try:
                return list(_in_order(trained, dense, experts, order))
            except UserError as error:
                refusal = refusal or error
    assert refusal
    raise refusal


def _trained(model: Model) -> Iterator[Model]:
    """Yield the model with all that may have been trained: all parameters first, then those without some of the biases.

    Biases are frozen where the model's family has none in their place, but the layer has.
    """
    biases = sorted({parameter.name for parameter in (*model.dense, *model.experts) if parameter.name.endswith(".bias")})
    for count in range(len(biases) + 1 if len(biases) <= _MOST_FROZEN else 1):
        for frozen in combinations(biases, count):
            dense, experts = ([weight for weight in part if weight.name not in frozen] for part in (model.dense, model.experts))
            yield model._replace(dense=dense, experts=experts)


def _in_order(model: Model, dense: Groups, experts: Groups, order: Order) -> Iterator[StateLocation]:
    optimizer = Optimizer(model.ranks, dense)
    chunks = divide(optimizer, [sorted(block, key=order) for block in blocks(model.dense)])
    yield from locate(optimizer, chunks)
    if experts:
        expert_optimizer = Optimizer(model.expert_ranks, experts)
        stages = optimizer.groups // optimizer.ranks
        yield from locate_experts(expert_optimizer, chunks, sorted(model.experts, key=order), stages)


def _runs(reader: TorchDistReader, locations: Iterable[StateLocation]) -> tuple[list[str], dict[str, Array]]:
    """Return what the weights' chunks are stored in, and for each key the numbers of that and of the first element there,
    [chunks, 2]. What all ranks hold is read from the first."""
    container, numbers = reader.container, dict[str, int]()
    runs: dict[str, Array] = {}
    for location in locations:
        pieces = location.parameter.pieces
        if location.rank >= len(pieces):
            continue
        label, at = location.buffer.run(location.slot)
        number = numbers.setdefault(label, len(numbers))
        for piece in pieces[location.rank]:
            key, chunk = piece
            if key not in runs:
                runs[key] = np.full((len(container.tensor(key)), 2), -1, np.int64)
            runs[key][chunk] = number, at
            at += elements(container, piece)
    for key, known in runs.items():
        if (known < 0).any():
            raise UserError(f"the optimizer state of a part of `{key}` is in no buffer", hint="the checkpoint is incomplete")
    return list(numbers), runs


def _sources(state: str, labels: Iterable[str], source: Source) -> dict[str, Flat]:
    """Return what holds a state of each label; empty where the optimizer does not keep it."""
    sources = {label: source(label, state) for label in labels}
    kept = {label: flat for label, flat in sources.items() if flat is not None}
    if kept and len(kept) < len(sources):
        lacking = next(label for label, flat in sources.items() if flat is None)
        raise UserError(f"`{lacking}` lacks `{state}`", hint="the checkpoint is incomplete: copy it again")
    return kept


def _reader(
    reader: TorchDistReader, state: str, runs: Mapping[str, Array], labels: list[str], sources: Mapping[str, Flat]
) -> Reader:
    prefix, container = f"optimizer.state.{state}.", reader.container
    tensors = dict[str, ChunkedTensor]()
    for key, of_key in runs.items():
        shape, starts, sizes = container.tensor(key).bounds()
        spec = TensorSpec(prefix + key, shape, DTYPES["fp32"])
        tensors[spec.name] = sharded(spec, np.concatenate([starts, sizes], axis=1), of_key, labels)
    return TorchDistReader(reader.folder, prefix=prefix, container=FlatShards(container, tensors, sources, labels))


def _merged(optimizers: Iterable[Groups]) -> Groups:
    """Return the groups of optimizers that divide a model's chunks: the buffers of one after those of the other."""
    together: dict[int, list[Buffer]] = {}
    for group, buffers in chain.from_iterable(of_one.items() for of_one in optimizers):
        together.setdefault(group, []).extend(buffers)
    return together
