"""From a family's rules and a source's tensor list to everything one conversion does.

Planning reads no tensor data. It accounts for every tensor on both sides, or says which it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import numpy as np

from converter.layout import Layout, shards
from converter.model import Model
from converter.rows import RowRange
from converter.rules import Rule, alternatives, fill, in_order
from converter.values import target_dtype
from formats.arrays import contiguous_regions
from formats.errors import UserError
from formats.spec import DTYPES, Region, Shape, TensorSpec, dtype_name, extent

Specs = Mapping[str, TensorSpec]

PIECE_AXES = "every leading axis"
"""How tensors are cut into pieces, as journals say it: up to mbtools 0.1 it was along the first alone, and not said."""


@dataclass(frozen=True, slots=True)
class RowCopy:
    """Rows `there` on of a source tensor become rows `here` on of a target tensor."""

    source: str
    dtype: np.dtype[Any]
    """The source's; its values are cast where it is not the target's."""

    src_row: int
    dst_row: int
    rows: int


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One target tensor, and the runs of rows of `parts` that make it; rows that no run covers are zero. Tensors that are made
    alike in every layer share their runs."""

    spec: TensorSpec
    parts: tuple[TensorSpec, ...] = ()
    ranges: Sequence[RowRange] = ()

    @property
    def copies(self) -> Iterator[RowCopy]:
        """The runs, each with the tensor it is of."""
        for run in self.ranges:
            part = self.parts[run.part]
            yield RowCopy(part.name, part.dtype, run.src_row, run.dst_row, run.rows)

    @property
    def sources(self) -> dict[str, np.dtype[Any]]:
        """The tensors it is made of, with their dtypes."""
        return {part.name: part.dtype for part in self.parts}

    @property
    def dtypes(self) -> set[np.dtype[Any]]:
        """Those of its sources and its own."""
        return {self.spec.dtype, *[part.dtype for part in self.parts]}


def same_tensor(spec: TensorSpec, part: TensorSpec) -> TensorPlan:
    """A tensor that is another, or as many of its first rows as it has."""
    return TensorPlan(spec, (part,), _whole_run(spec.shape[0]))


@cache
def _whole_run(rows: int) -> tuple[RowRange, ...]:
    return (RowRange(0, 0, 0, rows),)


def as_stored(specs: Mapping[str, TensorSpec]) -> dict[str, TensorPlan]:
    """Tensors read as they are."""
    return {name: same_tensor(spec, spec) for name, spec in specs.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a target tensor that is one run of bytes, small enough to hold in memory: the unit of work.

    Whole rows, or where one row is too large a part of one (see `contiguous_regions`).
    """

    tensor: TensorPlan
    region: Region

    @property
    def rows(self) -> slice:
        return self.region[0]

    @property
    def nbytes(self) -> int:
        return prod(extent(self.region)) * self.tensor.spec.dtype.itemsize

    def copies(self) -> Iterator[tuple[RowCopy, Region, slice]]:
        """What is copied, the source's region, and the piece's rows that it fills."""
        rows, rest = self.region[0], self.region[1:]
        for copy in self.tensor.copies:
            start, stop = max(rows.start, copy.dst_row), min(rows.stop, copy.dst_row + copy.rows)
            if start < stop:
                shift = copy.src_row - copy.dst_row
                yield copy, (slice(start + shift, stop + shift), *rest), slice(start - rows.start, stop - rows.start)


class Bound(NamedTuple):
    """A rule in one layer of a model."""

    rule: Rule
    layer: int

    @property
    def megatron(self) -> str:
        return fill(self.rule.megatron, self.layer)

    @property
    def huggingface(self) -> tuple[str, ...]:
        return self.rule.names(self.layer)[1]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion does: the tensors it makes, in file order, and what it must check first."""

    tensors: tuple[TensorPlan, ...]
    rules: tuple[Rule, ...]
    model: Model
    extras: tuple[str, ...] = ()
    """Source tensors that travel untouched."""

    equal: tuple[tuple[str, str], ...] = ()
    """Pairs of source tensors that must be the same."""

    zero: tuple[str, ...] = ()
    """Tensors that are zero on the Megatron side because the Hugging Face model has none."""

    @property
    def bound_rules(self) -> Iterator[tuple[Rule, int]]:
        """Every rule that applies, in every layer: one for each Megatron tensor."""
        return _in_order(self.rules, self.model)


def bind(rules: Iterable[Rule], model: Model, source: Specs) -> Iterator[Bound]:
    """Every rule that applies, in every layer; UserError for more layers than there are tensors."""
    _check_layers(model, source)
    return map(Bound._make, _in_order(rules, model))


def _check_layers(model: Model, source: Specs) -> None:
    """A layer has tensors, so layers are no more than those."""
    if model.layers > len(source):
        raise UserError(
            f"`config.json` says {model.layers} layers, but there are only {len(source)} tensors in all",
            hint="either the weights or `config.json` are of another model",
        )


def _in_order(rules: Iterable[Rule], model: Model) -> Iterator[tuple[Rule, int]]:
    """Every rule that applies, in every layer."""
    return in_order((rule for rule in rules if rule.when(model)), model)


def to_megatron(rules: Sequence[Rule], extras: Iterable[str], model: Model, source: Specs, *, dtype: str) -> Plan:
    """The plan that makes every Megatron tensor of `model` from Hugging Face tensors."""
    tables = _tables(rules, model, source)

    def wanted() -> Iterator[tuple[str, Shape]]:
        return chain.from_iterable(table.named(layer) for table, layer in tables() if not table.zeros)

    allowed = {fill(template, layer) for template in extras for layer in range(model.layers)}
    equal = [
        (name, rule.tied_to)
        for rule in rules
        if rule.tied_to and not rule.when(model)
        for name in rule.names(0)[1]
        if name in source
    ]
    _account(wanted, source, known=allowed | {name for name, _ in equal}, side="source")
    common = next(source[name].dtype for name, _ in wanted())  # which zero-filled tensors take
    tensor_plans = tuple([_fused(table, layer, source, common, dtype) for table, layer in tables()])
    zero = tuple([tensor_plan.spec.name for tensor_plan in tensor_plans if not tensor_plan.parts])
    present = sorted(allowed & source.keys())
    for name in present:
        if not source[name].shape:
            raise UserError(f"`{name}` has no dimensions", hint="it should hold a number for each pair of channels")
    return Plan(tensor_plans, tuple(rules), model, tuple(present), tuple(equal), zero)


@dataclass(frozen=True, slots=True)
class _Table:
    """What a rule says of one model: the same in every layer, so worked out once."""

    rule: Rule
    shape: Shape
    """The Megatron tensor's."""

    names: Sequence[str]
    """Templates of those of the Hugging Face tensors."""

    parts: Sequence[Shape]
    """The shapes of the Hugging Face tensors."""

    zeros: bool
    runs: tuple[RowRange, ...]
    """The runs of all parts into the Megatron tensor."""

    back: list[tuple[RowRange, ...]]
    """The runs of the Megatron tensor into each part."""

    def named(self, layer: int) -> Iterator[tuple[str, Shape]]:
        """The Hugging Face tensors of one layer, and their shapes."""
        return zip([fill(name, layer) for name in self.names], self.parts, strict=True)

    def stored(self, layer: int, source: Specs) -> str:
        """The Megatron tensor of one layer, under the name that this checkpoint's writer gave it."""
        name = fill(self.rule.megatron, layer)
        if name not in source and (other := fill(self.rule.alias, layer)) in source:
            return other
        return name


def _tables(rules: Sequence[Rule], model: Model, source: Specs) -> Callable[[], Iterator[tuple[_Table, int]]]:
    """The table and the layer of every rule that applies, in every layer, as often as they are asked for: objects for all would
    take tens of MiB."""
    _check_layers(model, source)
    known = {id(rule): _table(rule, model) for rule in rules if rule.when(model)}
    return lambda: ((known[id(rule)], layer) for rule, layer in _in_order(rules, model))


def _table(rule: Rule, model: Model) -> _Table:
    parts, runs = rule.part_shapes(model), tuple(rule.row_ranges(model))
    back = [
        tuple(RowRange(0, run.dst_row, run.src_row, run.rows) for run in runs if run.part == part) for part in range(len(parts))
    ]
    return _Table(rule, rule.shape(model), alternatives(rule.huggingface), parts, rule.absent(model), runs, back)


def _fused(table: _Table, layer: int, source: Specs, common: np.dtype[Any], dtype: str) -> TensorPlan:
    name = fill(table.rule.megatron, layer)
    if table.zeros:
        return TensorPlan(TensorSpec(name, table.shape, target_dtype(TensorSpec(name, table.shape, common), dtype)))
    parts = tuple([source[name] for name, _ in table.named(layer)])
    target = target_dtype(parts[0], dtype)
    for part in parts[1:]:
        if target_dtype(part, dtype) != target:
            raise _unequal_dtypes(parts[0], part, name)
    return TensorPlan(TensorSpec(name, table.shape, target), parts, table.runs)


def to_huggingface(rules: Sequence[Rule], model: Model, source: Specs, *, dtype: str, known: Specs | None = None) -> Plan:
    """The plan that makes every Hugging Face tensor of `model` from Megatron tensors. `known` are specs of such tensors, which
    are taken where they fit: a large model has hundreds of thousands of names."""
    tables = _tables(rules, model, source)

    def stored() -> Iterator[tuple[str, Shape]]:
        for table, layer in tables():
            name = table.stored(layer, source)
            yield name, _stored_shape(name, table, model, source)

    _account(stored, source, known=set(), side="checkpoint")
    tensor_plans, zero = list[TensorPlan](), list[str]()
    for table, layer in tables():
        if table.zeros:
            zero.append(table.stored(layer, source))
        else:
            tensor_plans += _split(table, layer, source, dtype, known or {})
    return Plan(tuple(tensor_plans), tuple(rules), model, zero=tuple(zero))


def _split(table: _Table, layer: int, source: Specs, dtype: str, known: Specs) -> Iterator[TensorPlan]:
    stored = source[table.stored(layer, source)]
    parts, target = (stored,), target_dtype(stored, dtype)
    for (name, shape), runs in zip(table.named(layer), table.back, strict=True):
        spec = known.get(name)
        if spec is None or spec.shape != shape or spec.dtype != target:
            spec = TensorSpec(name, shape, target)
        yield TensorPlan(spec, parts, runs)


def _stored_shape(name: str, table: _Table, model: Model, source: Specs) -> Shape:
    """The shape a stored tensor should have: any padding of the vocabulary will do."""
    stored = source.get(name) if table.rule.padded else None
    if stored and len(stored.shape) == len(table.shape) and stored.shape[0] >= model.vocab:
        return stored.shape[0], *table.shape[1:]
    return table.shape


def _account(wanted: Callable[[], Iterable[tuple[str, Shape]]], found: Specs, *, known: set[str], side: str) -> None:
    """Nothing missing, nothing left over, every shape as it should be."""
    missing, unlike, asked = list[str](), list[tuple[str, Shape]](), len(known & found.keys())
    for name, shape in wanted():
        spec = found.get(name)
        if spec is None:
            missing.append(name)
            continue
        asked += 1
        if spec.shape != shape:
            unlike.append((name, shape))
    over = sorted(found.keys() - known - {name for name, _ in wanted()}) if asked < len(found) else []
    if missing:
        instead = f"; it holds {list_names(over)}, for which this family has no place" if over else ""
        raise UserError(
            f"the {side} lacks {list_names(missing)}{instead}",
            hint="`config.json` describes a model with these tensors: either it or the weights are of another model",
        )
    if over:
        raise UserError(
            f"the {side} holds {list_names(over)}, for which this family has no place",
            hint="nothing is left out silently: is `config.json` of the same model?",
        )
    check_dtypes(found)
    for name, shape in unlike:
        raise UserError(
            f"`{name}` has shape {list(found[name].shape)}, by `config.json` it should be {list(shape)}",
            hint="either the weights or `config.json` are of another model",
        )


def check_dtypes(specs: Specs) -> None:
    """Raise UserError for tensors of a dtype that can only be reported and compared."""
    for spec in specs.values():
        if spec.stored_dtype not in DTYPES:
            raise UserError(
                f"`{spec.name}` is {spec.stored_dtype}, which cannot be converted",
                hint=f"those that can be are {', '.join(DTYPES)}; convert the weights to one of these first",
            )


def list_names(names: Sequence[str]) -> str:
    """The first three names, and how many more there are: for messages."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


def _unequal_dtypes(one: TensorSpec, other: TensorSpec, megatron: str) -> UserError:
    return UserError(
        f"`{one.name}` is {one.dtype} and `{other.name}` is {other.dtype}, but `{megatron}` is one tensor",
        hint="choose one dtype for all with `--dtype`",
    )


def casts(tensor_plans: Iterable[TensorPlan]) -> dict[str, str]:
    """The dtypes that values are cast from, each with what it is cast to."""
    changed = {(dtype, tensor_plan.spec.dtype) for tensor_plan in tensor_plans for dtype in tensor_plan.dtypes}
    changed = {(old, new) for old, new in changed if old != new}
    return {dtype_name(old): dtype_name(new) for old, new in sorted(changed, key=str)}


def sharded(plan: Plan, layout: Layout) -> Iterator[tuple[TensorSpec, tuple[tuple[Region, int], ...]]]:
    """Every Megatron tensor of a plan, with its chunks and the rank that holds each."""
    known: dict[Any, tuple[tuple[Region, int], ...]] = {}
    stage_of = cache(layout.stage)
    for (rule, layer), tensor_plan in zip(plan.bound_rules, plan.tensors, strict=True):
        stage, shape = stage_of(layer), tensor_plan.spec.shape
        like = shape, rule.partition_dim, rule.partition_stride, stage
        if like not in known:
            cut = shards(shape, rule.partition_dim, rule.partition_stride, layout.tp)
            known[like] = tuple((region, layout.rank(stage, tp_rank)) for region, tp_rank in cut)
        yield tensor_plan.spec, known[like]


def pieces(tensor_plans: Iterable[TensorPlan], *, limit: int) -> Iterator[Piece]:
    """Tensors as pieces in C order, none of more than `limit` bytes in the source's dtype or its own.

    Their numbers are written down in journals: with another order or size, `resumable` has to differ.
    """
    for tensor_plan in tensor_plans:
        count = limit // max(dtype.itemsize for dtype in tensor_plan.dtypes)
        for region in contiguous_regions(tensor_plan.spec.shape, count):
            yield Piece(tensor_plan, region)
