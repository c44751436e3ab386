"""Which rank's file of Megatron-LM holds which part of a weight, and under which name: its own layers and experts are counted
from 0, its gates come before what they multiply, and what all ranks need each has a copy of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from converter.config import Config
from converter.layout import Layout, shards
from converter.planner import Plan
from converter.rules import Indices, Rule, megatron_layer
from converter.state_dicts import empty_states, weight_name
from formats.errors import UserError
from formats.rank_files_writer import Holder, RankArray, RankFilesWriter, RankState
from formats.rank_folders import FILE, Rank, folder_of
from formats.rank_names import EMBEDDING, GATED, OUTPUT, partition_dim
from formats.spec import Shape, TensorSpec

_ELSEWHERE = "`--ckpt-format torch_dist` holds every model in every layout"


def rank_files_writer(
    plan: Plan, layout: Layout, megatron: Config, common: Mapping[str, Any], implementation: str
) -> RankFilesWriter:
    """Return the files of a plan's weights in a layout. `megatron`: the model's fields; `common`: what each file has beside
    weights. Raises UserError for models and layouts that such files cannot hold."""
    _check_layout(layout, megatron)
    weights = list(_weights(plan, layout, megatron, implementation))
    names: dict[tuple[str, int], list[str]] = {}
    for _, arrays in weights:
        for holder in (holder for each in arrays for holder in each.holders):
            names.setdefault((holder.file, holder.chunk), []).append(holder.name)
    last = layout.pp * layout.vpp - 1

    def state(rank: Rank) -> RankState:
        file = _file(rank, layout)
        chunks = [(chunk, chunk * layout.pp + rank.pp == last) for chunk in range(layout.vpp)]
        empty = [list(empty_states(names.get((file, chunk), []), megatron, implementation, last=end)) for chunk, end in chunks]
        return RankState(file, empty)

    ranks = (Rank(*each) for each in product(range(layout.tp), range(layout.pp), range(layout.ep)))
    return RankFilesWriter(weights, map(state, ranks), common)


def _check_layout(layout: Layout, megatron: Config) -> None:
    if megatron.get("is_hybrid_model") or megatron.get("hybrid_layer_pattern"):
        raise UserError("files of ranks are of layout gpt, and this is layout hybrid", hint=_ELSEWHERE)
    if megatron.get("mtp_num_layers"):
        raise UserError("files of ranks are written without layers of multi-token prediction, which this has", hint=_ELSEWHERE)
    if megatron.get("num_moe_experts") and layout.etp != layout.tp:
        raise UserError(
            f"files of ranks have experts divided as all else is: `--etp` is {layout.etp} and `--tp` {layout.tp}", hint=_ELSEWHERE
        )


class _HoldingRanks(NamedTuple):
    """The ranks that hold a weight, and its name there."""

    stage: int
    chunk: int
    name: str
    ep: range

    def holders(self, layout: Layout, tp: range) -> Iterator[Holder]:
        for tp_rank, ep_rank in product(tp, self.ep):
            yield Holder(_file(Rank(tp_rank, self.stage, ep_rank), layout), self.chunk, self.name)


def _file(rank: Rank, layout: Layout) -> str:
    return f"{folder_of(rank, pp=layout.pp, ep=layout.ep)}{FILE}"


def _weights(
    plan: Plan, layout: Layout, megatron: Config, implementation: str
) -> Iterator[tuple[TensorSpec, tuple[RankArray, ...]]]:
    """Yield the weights of a plan, with the arrays that ranks hold of each."""
    tied = megatron.get("share_embeddings_and_output_weights") and layout.pp > 1
    for (rule, indices), tensor_plan in zip(plan.bound_rules, plan.tensors, strict=True):
        spec = tensor_plan.spec
        _check_division(rule, spec.name)
        holding = [_holding_ranks(rule, indices, plan, layout, implementation)]
        if tied and spec.name == EMBEDDING:
            holding.append(_HoldingRanks(layout.pp - 1, layout.vpp - 1, OUTPUT, range(layout.ep)))
        yield spec, tuple(_arrays(rule, spec.shape, holding, layout))


def _check_division(rule: Rule, name: str) -> None:
    """Raise UserError for a weight whose division over ranks the reader of such files does not know."""
    try:
        known = partition_dim(name, 2) == rule.partition_dim and (rule.partition_stride == 1 or GATED in name)
    except UserError:
        known = False
    if not known:
        raise UserError(f"files of ranks cannot hold `{name}`: how ranks divide it is not known there", hint=_ELSEWHERE)


def _holding_ranks(rule: Rule, indices: Indices, plan: Plan, layout: Layout, implementation: str) -> _HoldingRanks:
    layer = megatron_layer(rule, indices, plan.model)
    number = layout.model_chunk(layer)
    local, ep = {**indices, "layer": layer - layout.first_layer(number)}, range(layout.ep)
    if rule.is_expert:
        count = plan.model.experts // layout.ep
        owner, local["expert"] = divmod(indices["expert"], count)
        ep = range(owner, owner + 1)
    return _HoldingRanks(number % layout.pp, number // layout.pp, weight_name(rule, local, implementation), ep)


def _arrays(rule: Rule, shape: Shape, holding: list[_HoldingRanks], layout: Layout) -> Iterator[RankArray]:
    """Yield what ranks hold of a weight: one array that all have, or one for each tensor-parallel rank."""
    cut = shards(shape, rule.partition_dim, rule.partition_stride, layout.tp)
    if rule.partition_dim is None:
        everywhere = tuple(holder for ranks in holding for holder in ranks.holders(layout, range(layout.tp)))
        yield RankArray(shape, ((cut[0][0], (0,) * len(shape)),), everywhere)
        return
    dim = rule.partition_dim
    step = shape[dim] // len(cut)
    own = tuple(size // layout.tp if axis == dim else size for axis, size in enumerate(shape))
    for tp_rank in range(layout.tp):
        regions = [region for region, rank in cut if rank == tp_rank]
        own_shards = tuple(
            (region, tuple(block * step if axis == dim else 0 for axis in range(len(shape))))
            for block, region in enumerate(regions)
        )
        holders = tuple(holder for ranks in holding for holder in ranks.holders(layout, range(tp_rank, tp_rank + 1)))
        yield RankArray(own, own_shards, holders)
