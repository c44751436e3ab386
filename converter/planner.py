"""From a family's rules and a source's tensor list to everything one conversion does.

Planning reads no tensor data. It accounts for every tensor on both sides, or says which it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from converter import prediction_layers
from converter.layout import Layout, shards
from converter.model import Model
from converter.plan import Specs, TensorPlan, check_dtypes, list_names
from converter.rows import RowRange
from converter.rules import Indices, Rule, extra_names, fill, in_order, megatron_layer, tied_names
from converter.spellings import spelled_as
from converter.tables import Table, Tables
from converter.transform import Transform
from converter.values import target_dtype
from formats.errors import UserError
from formats.spec import DTYPES, Region, Shape, TensorSpec


class Bound(NamedTuple):
    """A rule with the numbers of its layer and its expert."""

    rule: Rule
    indices: Indices

    @property
    def megatron(self) -> str:
        return fill(self.rule.megatron, self.indices)

    @property
    def huggingface(self) -> tuple[str, ...]:
        return self.rule.names(self.indices)[1]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion does: the tensors it makes, in file order, and what it must check first."""

    tensors: tuple[TensorPlan, ...]
    rules: tuple[Rule, ...]
    model: Model
    extras: tuple[str, ...] = ()
    """Source tensors that pass through untouched."""

    equal: tuple[tuple[str, str], ...] = ()
    """Pairs of source tensors that must be the same."""

    filled: Mapping[str, float] = field(default_factory=dict[str, float])
    """Megatron tensors that Hugging Face's model has not, with the number that all their values are."""

    kept: tuple[TensorPlan, ...] = ()
    """Those that Megatron keeps in a dtype of their own."""

    @property
    def zero(self) -> list[str]:
        """Those of `filled` that are zero."""
        return [name for name, value in self.filled.items() if not value]

    @property
    def bound_rules(self) -> Iterator[tuple[Rule, Indices]]:
        """Every rule that applies, with its indices: one for each Megatron tensor."""
        return in_order(self.rules, self.model)


def bind(rules: Iterable[Rule], model: Model, source: Specs) -> Iterator[Bound]:
    """Yield every rule that applies, with its indices; UserError for more layers than there are tensors."""
    _check_counts(model, source)
    return map(Bound._make, in_order(rules, model))


def huggingface_tensors(rules: Iterable[Rule], model: Model, source: Specs) -> Iterator[tuple[str, Shape]]:
    """Yield every Hugging Face tensor of a model, with its shape; UserError for more layers than there are tensors."""
    _check_counts(model, source)
    for table, indices in Tables(rules, model):
        yield from table.owned_by(indices)


def _check_counts(model: Model, source: Specs) -> None:
    """A layer has tensors, so layers are no more than those; nor, of a tensor for each expert or all of them, are experts."""
    if model.layers > len(source):
        raise UserError(
            f"`config.json` says {model.layers} layers, but there are only {len(source)} tensors in all",
            hint="either the weights or `config.json` are of another model",
        )
    for name, what in (("experts", "experts"), ("mtp", "layers of multi-token prediction")):
        count = model.get(name, 0)
        if count > len(source) and (name == "mtp" or count > max(max(spec.shape, default=0) for spec in source.values())):
            raise UserError(
                f"`config.json` says {model.get(name)} {what}, more than the tensors there are could hold",
                hint="either the weights or `config.json` are of another model",
            )


def to_megatron(
    rules: Sequence[Rule], extras: Iterable[str], model: Model, source: Specs, *, dtype: str, passing: tuple[str, ...] = ()
) -> Plan:
    """Return the plan that makes every Megatron tensor of `model` from Hugging Face tensors. Names that begin with one of
    `passing` pass through, as `extras` do."""
    _check_counts(model, source)
    tables = Tables(rules, model)

    def wanted() -> Iterator[tuple[str, Shape]]:
        for table, indices in tables:
            yield from table.owned_by(indices)

    allowed = extra_names(extras, model) | {name for name in source if passing and name.startswith(passing)}
    allowed |= prediction_layers.further(rules, model, source)
    equal = [(name, other) for name, other in tied_names(rules, model).items() if name in source]
    owned = iter(_account(wanted, source, known=allowed | {name for name, _ in equal}, side="source"))
    common = next(source[name].dtype for name, _ in wanted())  # which filled tensors take
    filled, tensor_plans, kept = dict[str, float](), list[TensorPlan](), list[TensorPlan]()
    for table, indices in tables:
        tensor_plans.append(_fused(table, indices, _parts(table, indices, source, owned), common, dtype))
        if table.rule.keep_dtype:
            kept.append(tensor_plans[-1])
        if table.filled:
            filled[tensor_plans[-1].spec.name] = table.rule.fill
    present = sorted(allowed & source.keys())
    return Plan(tuple(tensor_plans), tuple(rules), model, tuple(present), tuple(equal), filled, tuple(kept))


def _parts(table: Table, indices: Indices, source: Specs, owned: Iterator[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return the Hugging Face tensors of a table. Those that no table before names are the next of `owned`."""
    own = table.owns(indices)
    return tuple([next(owned) if mine else source[fill(name, indices)] for name, mine in zip(table.names, own, strict=True)])


def _fused(table: Table, indices: Indices, parts: tuple[TensorSpec, ...], common: np.dtype[Any], dtype: str) -> TensorPlan:
    name = fill(table.rule.megatron, indices)
    if table.filled:
        target = _kept(table.rule) or target_dtype(TensorSpec(name, table.shape, common), dtype)
        return TensorPlan(TensorSpec(name, table.shape, target), transform=table.forward)
    target = _kept(table.rule) or target_dtype(parts[0], dtype)
    for part in parts[1:]:
        if part.dtype != parts[0].dtype and not table.rule.keep_dtype and target_dtype(part, dtype) != target:
            raise _unequal_dtypes(parts[0], part, name)
    experts = _same_expert(indices["expert"], len(parts)) if table.is_stacked else ()
    return TensorPlan(TensorSpec(name, table.shape, target), parts, table.ranges, experts, table.forward)


@cache
def _same_expert(expert: int, parts: int) -> tuple[int, ...]:
    return (expert,) * parts


def _kept(rule: Rule) -> np.dtype[Any] | None:
    return DTYPES[rule.keep_dtype] if rule.keep_dtype else None


def to_huggingface(rules: Sequence[Rule], model: Model, source: Specs, *, dtype: str, known: Specs | None = None) -> Plan:
    """Return the plan that makes every Hugging Face tensor of `model` from Megatron tensors. `known` are specs of such tensors,
    which are taken where they fit: a large model has hundreds of thousands of names."""
    tables = Tables(rules, model)
    stored = stored_tensors(tables, model, source)
    made = _ExportedTensors(source, dtype, known or {})
    filled, kept = dict[str, float](), set[str]()
    for (table, indices), spec in zip(tables, stored, strict=True):
        kept |= {fill(name, indices) for name in table.names} if table.rule.keep_dtype else set()
        if table.filled:
            filled[spec.name] = table.rule.fill
        else:
            made.add(table, indices, spec)
    plans = tuple(made.all())
    return Plan(
        plans,
        tuple(rules),
        model,
        filled=filled,
        kept=tuple([tensor_plan for tensor_plan in plans if tensor_plan.spec.name in kept]),
    )


def stored_tensors(tables: Tables, model: Model, source: Specs) -> list[TensorSpec]:
    """Return the tensors of a Megatron checkpoint, one for each table with its indices. Raises UserError unless these are there,
    no others, and all in their shapes; a vocabulary may be padded otherwise."""
    _check_counts(model, source)

    def stored() -> Iterator[tuple[str, Shape]]:
        for table, indices in tables:
            name = _stored_name(table, indices, source)
            yield name, _stored_shape(name, table, model, source)

    return _account(stored, source, known=set(), side="checkpoint")


@dataclass(slots=True)
class _Gathered:
    """A Hugging Face tensor that several Megatron tensors make: those, and the ranges of each."""

    spec: TensorSpec
    transform: Transform | None
    parts: list[TensorSpec] = field(default_factory=list[TensorSpec])
    ranges: list[tuple[RowRange, ...]] = field(default_factory=list[tuple[RowRange, ...]])
    experts: list[int] = field(default_factory=list[int])


class _ExportedTensors:
    """The Hugging Face tensors of an export, in the order in which they are first named."""

    def __init__(self, source: Specs, dtype: str, known: Specs) -> None:
        self._source, self._dtype, self._known = source, dtype, known
        self._plans: list[TensorPlan | _Gathered] = []
        self._gathered: dict[str, _Gathered] = {}
        self._ranges: dict[tuple[int, ...], tuple[RowRange, ...]] = {}
        """One table for all tensors that are gathered of the same ranges."""

    def add(self, table: Table, indices: Indices, stored: TensorSpec) -> None:
        """Note the Hugging Face tensors that a stored Megatron tensor makes, or has a part in."""
        parts = (stored,)
        for number, template in enumerate(table.names):
            name, ranges = fill(template, indices), table.back[number]
            if not table.shared[number]:
                self._plans.append(TensorPlan(self._spec(name, table, number, stored), parts, ranges, (), table.backward))
                continue
            if name not in self._gathered:
                self._gathered[name] = _Gathered(self._spec(name, table, number, stored), table.backward)
                self._plans.append(self._gathered[name])
            self._join(self._gathered[name], table, indices, stored, ranges)

    def _join(self, tensor: _Gathered, table: Table, indices: Indices, stored: TensorSpec, ranges: tuple[RowRange, ...]) -> None:
        if tensor.parts and self._target(tensor.spec.name, table, stored) != tensor.spec.dtype:
            raise _unequal_dtypes(tensor.parts[0], stored, tensor.spec.name)
        tensor.parts.append(stored)
        tensor.ranges.append(ranges)
        if table.is_stacked:
            tensor.experts.append(indices["expert"])

    def _spec(self, name: str, table: Table, number: int, stored: TensorSpec) -> TensorSpec:
        shape, target, spec = table.shapes[number], self._target(name, table, stored), self._known.get(name)
        return spec if spec and (spec.shape, spec.dtype) == (shape, target) else TensorSpec(name, shape, target)

    def _target(self, name: str, table: Table, stored: TensorSpec) -> np.dtype[Any]:
        """The dtype it is written in: of one that Megatron keeps in a dtype, whatever is asked for, that which it had before."""
        if not table.rule.keep_dtype:
            return target_dtype(stored, self._dtype)
        return self._known[name].dtype if name in self._known else stored.dtype

    def all(self) -> Iterator[TensorPlan]:
        for plan in self._plans:
            yield self._plan(plan) if isinstance(plan, _Gathered) else plan

    def _plan(self, gathered: _Gathered) -> TensorPlan:
        key = tuple([id(ranges) for ranges in gathered.ranges])
        if key not in self._ranges:
            numbered = [
                RowRange(part, run.src_row, run.dst_row, run.rows, run.step)
                for part, ranges in enumerate(gathered.ranges)
                for run in ranges
            ]
            self._ranges[key] = tuple(numbered)
        return TensorPlan(gathered.spec, tuple(gathered.parts), self._ranges[key], tuple(gathered.experts), gathered.transform)


def _stored_name(table: Table, indices: Indices, source: Specs) -> str:
    """The name that this checkpoint's writer gave a Megatron tensor."""
    name = fill(table.rule.megatron, indices)
    other = fill(table.rule.alias or table.rule.megatron, indices)
    return other if name not in source and other in source else spelled_as(source, name)


def _stored_shape(name: str, table: Table, model: Model, source: Specs) -> Shape:
    """The shape a stored tensor should have: any padding of the vocabulary will do."""
    stored = source.get(name) if table.rule.padded else None
    if stored and len(stored.shape) == len(table.shape) and stored.shape[0] >= model.vocab:
        return stored.shape[0], *table.shape[1:]
    return table.shape


def _account(wanted: Callable[[], Iterable[tuple[str, Shape]]], given: Specs, *, known: set[str], side: str) -> list[TensorSpec]:
    """Return the tensors that are wanted, in order. Raises UserError unless nothing is missing, nothing is left over, and every
    shape is as it should be."""
    specs, missing, unlike = list[TensorSpec](), list[str](), list[tuple[str, Shape]]()
    for name, shape in wanted():
        spec = given.get(name)
        if spec is None:
            missing.append(name)
            continue
        specs.append(spec)
        if spec.shape != shape:
            unlike.append((name, shape))
    is_more = len(specs) + len(known & given.keys()) < len(given)
    over = sorted(given.keys() - known - {name for name, _ in wanted()}) if is_more else []
    if missing:
        instead = f"; it holds {list_names(over)}, for which this family has no place" if over else ""
        raise UserError(
            f"the {side} lacks {list_names(missing)}{instead}",
            hint="`config.json`, or the settings that stand in for it (`run_config.yaml`, `args`), describes a model with these "
            "tensors: either they or the weights are of another model",
        )
    if over:
        raise UserError(
            f"the {side} holds {list_names(over)}, for which this family has no place",
            hint="nothing is left out silently: is `config.json` of the same model?",
        )
    check_dtypes(given)
    for name, shape in unlike:
        raise UserError(
            f"`{name}` has shape {list(given[name].shape)}, by `config.json` it should be {list(shape)}",
            hint="either the weights or `config.json` are of another model",
        )
    return specs


def _unequal_dtypes(one: TensorSpec, other: TensorSpec, name: str) -> UserError:
    return UserError(
        f"`{one.name}` is {one.dtype} and `{other.name}` is {other.dtype}, but `{name}` is one tensor",
        hint="choose one dtype for all with `--dtype`",
    )


def sharded(plan: Plan, layout: Layout) -> Iterator[tuple[TensorSpec, tuple[tuple[Region, int], ...]]]:
    """Yield every Megatron tensor of a plan, with its chunks and the rank that holds each."""
    known: dict[Any, tuple[tuple[Region, int], ...]] = {}
    stage_of = cache(layout.stage)
    for (rule, indices), tensor_plan in zip(plan.bound_rules, plan.tensors, strict=True):
        stage, shape = stage_of(megatron_layer(rule, indices, plan.model)), tensor_plan.spec.shape
        owner = layout.expert_owner(indices["expert"], plan.model.experts) if rule.is_expert else None
        like = shape, rule.partition_dim, rule.partition_stride, stage, owner
        if like not in known:
            size = layout.tp if owner is None else layout.etp
            cut = shards(shape, rule.partition_dim, rule.partition_stride, size)
            known[like] = tuple((region, layout.rank(stage, tp_rank, owner)) for region, tp_rank in cut)
        yield tensor_plan.spec, known[like]
