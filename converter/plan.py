"""From a family's rules and a source's tensor list to everything one conversion does.

Planning reads no tensor data. It accounts for every tensor on both sides, or says which it cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, cast, overload

import numpy as np

from converter.layout import Layout, boxes
from converter.model import Model
from converter.rows import Run
from converter.rules import Rule, fill, in_order
from converter.values import target_dtype
from formats.arrays import contiguous_regions
from formats.errors import UserError
from formats.spec import DTYPES, Region, TensorSpec, dtype_name, extent

Specs = Mapping[str, TensorSpec]

PIECE_AXES = "every leading axis"
"""How tensors are cut into pieces, as journals say it: up to mbtools 0.1 it was along the first alone, and not said."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Rows `there` on of a source tensor become rows `here` on of a target tensor."""

    source: str
    dtype: np.dtype[Any]
    """The source's; its values are cast where it is not the target's."""

    there: int
    here: int
    count: int


class RowCopies(Sequence[Copy]):
    """Copies from tensors by a row table. A table is the same in every layer, so it is kept once and copies are made as they are
    asked for."""

    __slots__ = ("parts", "runs")

    def __init__(self, parts: tuple[TensorSpec, ...], runs: Sequence[Run]) -> None:
        self.parts, self.runs = parts, runs

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Copy]:
        return map(self._copy, self.runs)

    @overload
    def __getitem__(self, index: int) -> Copy: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Copy]: ...
    def __getitem__(self, index: int | slice) -> Copy | Sequence[Copy]:
        if isinstance(index, slice):
            return RowCopies(self.parts, self.runs[index])
        return self._copy(self.runs[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(cast("Sequence[Any]", other))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def _copy(self, run: Run) -> Copy:
        part = self.parts[run.part]
        return Copy(part.name, part.dtype, run.there, run.here, run.count)


@dataclass(frozen=True, slots=True)
class Making:
    """One target tensor and the copies that make it; rows that no copy covers are zero."""

    spec: TensorSpec
    copies: Sequence[Copy]

    @property
    def sources(self) -> dict[str, np.dtype[Any]]:
        """The tensors it is made of, with their dtypes."""
        if isinstance(self.copies, RowCopies):
            return {part.name: part.dtype for part in self.copies.parts}
        return {copy.source: copy.dtype for copy in self.copies}

    @property
    def rows(self) -> Sequence[Run] | Sequence[Copy]:
        """Which rows go where: one object for all layers' tensors that are made alike."""
        return self.copies.runs if isinstance(self.copies, RowCopies) else self.copies

    @property
    def dtypes(self) -> set[np.dtype[Any]]:
        """Those of its sources and its own."""
        parts = self.copies.parts if isinstance(self.copies, RowCopies) else self.copies
        return {self.spec.dtype, *[part.dtype for part in parts]}


def as_stored(specs: Mapping[str, TensorSpec]) -> dict[str, Making]:
    """Tensors read as they are."""
    return {name: Making(spec, (Copy(name, spec.dtype, 0, 0, spec.shape[0]),)) for name, spec in specs.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a target tensor that is one run of bytes, small enough to hold in memory: the unit of work.

    Whole rows, or where one row is too large a part of one (see `contiguous_regions`).
    """

    making: Making
    region: Region

    @property
    def rows(self) -> slice:
        return self.region[0]

    @property
    def nbytes(self) -> int:
        return prod(extent(self.region)) * self.making.spec.dtype.itemsize

    def copies(self) -> Iterator[tuple[Copy, Region, slice]]:
        """What is copied, the source's region, and the piece's rows that it fills."""
        rows, rest = self.region[0], self.region[1:]
        for copy in self.making.copies:
            start, stop = max(rows.start, copy.here), min(rows.stop, copy.here + copy.count)
            if start < stop:
                shift = copy.there - copy.here
                yield copy, (slice(start + shift, stop + shift), *rest), slice(start - rows.start, stop - rows.start)


@dataclass(frozen=True, slots=True)
class Bound:
    """A rule in one layer of one model."""

    rule: Rule
    layer: int
    megatron: str
    huggingface: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion does: the tensors it makes, in file order, and what it must check first."""

    makings: tuple[Making, ...]
    bound: tuple[Bound, ...]
    extras: tuple[str, ...] = ()
    """Source tensors that travel untouched."""

    equal: tuple[tuple[str, str], ...] = ()
    """Pairs of source tensors that must be the same."""

    zero: tuple[str, ...] = ()
    """Tensors that are zero on the Megatron side because the Hugging Face model has none."""


def bind(rules: Iterable[Rule], model: Model, source: Specs) -> list[Bound]:
    """Every rule that applies, with the names it stands for. A layer has tensors, so layers are no more than those."""
    if model.layers > len(source):
        raise UserError(
            f"`config.json` says {model.layers} layers, but there are only {len(source)} tensors in all",
            hint="either the weights or `config.json` are of another model",
        )
    return [_bound(rule, layer, source) for rule, layer in in_order(rules, model) if rule.when(model)]


def _bound(rule: Rule, layer: int, source: Specs) -> Bound:
    """The names are the source's own objects where it has them: a large model has hundreds of thousands."""
    megatron, huggingface = rule.names(layer)
    return Bound(rule, layer, _same_object(megatron, source), tuple([_same_object(name, source) for name in huggingface]))


def _same_object(name: str, source: Specs) -> str:
    found = source.get(name)
    return name if found is None else found.name


def to_megatron(rules: Sequence[Rule], extras: Iterable[str], model: Model, source: Specs, *, dtype: str) -> Plan:
    """The plan that makes every Megatron tensor of `model` from Hugging Face tensors."""
    bound, tables = bind(rules, model, source), _tables(rules, model)
    of_source = (one for one in bound if not tables[id(one.rule)].zeros)
    wanted = {name: shape for one in of_source for name, shape in tables[id(one.rule)].named(one)}
    allowed = {fill(template, layer) for template in extras for layer in range(model.layers)}
    equal = [
        (name, rule.same_as)
        for rule in rules
        if rule.same_as and not rule.when(model)
        for name in rule.names(0)[1]
        if name in source
    ]
    _account(wanted, source, known=allowed | {name for name, _ in equal}, side="source")
    common = _dtypes(wanted, source)
    del wanted
    makings = [_fused(one, tables[id(one.rule)], source, common, dtype) for one in bound]
    zero = [one.megatron for one in bound if tables[id(one.rule)].zeros]
    present = sorted(allowed & source.keys())
    for name in present:
        if not source[name].shape:
            raise UserError(f"`{name}` has no dimensions", hint="it should hold a number for each pair of channels")
    return Plan(tuple(makings), tuple(bound), tuple(present), tuple(equal), tuple(zero))


@dataclass(frozen=True, slots=True)
class _Table:
    """What a rule says of one model: the same in every layer, so worked out once."""

    shape: tuple[int, ...]
    """The Megatron tensor's."""

    parts: list[tuple[int, ...]]
    """Those of the Hugging Face tensors."""

    zeros: bool
    runs: tuple[Run, ...]
    """The runs of all parts into the Megatron tensor."""

    back: list[tuple[Run, ...]]
    """The runs of the Megatron tensor into each part."""

    def named(self, one: Bound) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The Hugging Face tensors of one layer, and their shapes."""
        return zip(one.huggingface, self.parts, strict=True)


def _tables(rules: Iterable[Rule], model: Model) -> dict[int, _Table]:
    """The tables of the rules that apply, by `id`: a rule is compared field by field otherwise."""
    return {id(rule): _table(rule, model) for rule in rules if rule.when(model)}


def _table(rule: Rule, model: Model) -> _Table:
    parts, runs = rule.part_shapes(model), tuple(rule.runs(model))
    back = [tuple(Run(0, run.here, run.there, run.count) for run in runs if run.part == part) for part in range(len(parts))]
    return _Table(rule.shape(model), parts, rule.zeros(model), runs, back)


def _fused(one: Bound, table: _Table, source: Specs, common: np.dtype[Any], dtype: str) -> Making:
    if table.zeros:
        target = target_dtype(TensorSpec(one.megatron, table.shape, common), dtype)
        return Making(TensorSpec(one.megatron, table.shape, target), ())
    parts = tuple([source[name] for name in one.huggingface])
    target = target_dtype(parts[0], dtype)
    for part in parts[1:]:
        if target_dtype(part, dtype) != target:
            raise _unequal_dtypes(parts[0], part, one.megatron)
    return Making(TensorSpec(one.megatron, table.shape, target), RowCopies(parts, table.runs))


def to_huggingface(rules: Sequence[Rule], model: Model, source: Specs, *, dtype: str) -> Plan:
    """The plan that makes every Hugging Face tensor of `model` from Megatron tensors."""
    bound, tables = [_as_stored(one, source) for one in bind(rules, model, source)], _tables(rules, model)
    stored = {one.megatron: _stored_shape(one, tables[id(one.rule)].shape, model, source) for one in bound}
    _account(stored, source, known=set(), side="checkpoint")
    del stored
    made, zero = list[Making](), list[str]()
    for one in bound:
        table = tables[id(one.rule)]
        if table.zeros:
            zero.append(one.megatron)
        else:
            made += _split(one, table, source, dtype)
    return Plan(tuple(made), tuple(bound), zero=tuple(zero))


def _split(one: Bound, table: _Table, source: Specs, dtype: str) -> Iterator[Making]:
    spec = source[one.megatron]
    whole, target = (spec,), target_dtype(spec, dtype)
    for (name, shape), runs in zip(table.named(one), table.back, strict=True):
        yield Making(TensorSpec(name, shape, target), RowCopies(whole, runs))


def _as_stored(one: Bound, source: Specs) -> Bound:
    """The same, under the name that this checkpoint's writer gave it."""
    if one.megatron in source:
        return one
    other = fill(one.rule.also, one.layer)
    return Bound(one.rule, one.layer, other, one.huggingface) if other in source else one


def _stored_shape(one: Bound, shape: tuple[int, ...], model: Model, source: Specs) -> tuple[int, ...]:
    """The shape a stored tensor should have: any padding of the vocabulary will do."""
    stored = source.get(one.megatron) if one.rule.padded else None
    if stored and len(stored.shape) == len(shape) and stored.shape[0] >= model.vocab:
        return stored.shape[0], *shape[1:]
    return shape


def _account(wanted: Mapping[str, tuple[int, ...]], found: Specs, *, known: set[str], side: str) -> None:
    """Nothing missing, nothing left over, every shape as it should be."""
    missing = [name for name in wanted if name not in found]
    over = sorted([name for name in found if name not in wanted and name not in known])
    if missing:
        instead = f"; it holds {named(over)}, for which this family has no place" if over else ""
        raise UserError(
            f"the {side} lacks {named(missing)}{instead}",
            hint="`config.json` describes a model with these tensors: either it or the weights are of another model",
        )
    if over:
        raise UserError(
            f"the {side} holds {named(over)}, for which this family has no place",
            hint="nothing is left out silently: is `config.json` of the same model?",
        )
    check_dtypes(found)
    for name, shape in wanted.items():
        if found[name].shape != shape:
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


def named(names: Sequence[str]) -> str:
    """The first three names, and how many more there are: for messages."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


def _dtypes(wanted: Iterable[str], source: Specs) -> np.dtype[Any]:
    """The dtype of the first tensor with data, which zero-filled ones take."""
    return next(source[name].dtype for name in wanted)


def _unequal_dtypes(one: TensorSpec, other: TensorSpec, megatron: str) -> UserError:
    return UserError(
        f"`{one.name}` is {one.dtype} and `{other.name}` is {other.dtype}, but `{megatron}` is one tensor",
        hint="choose one dtype for all with `--dtype`",
    )


def casts(makings: Iterable[Making]) -> dict[str, str]:
    """The dtypes that values are cast from, each with what it is cast to."""
    changed = {(dtype, making.spec.dtype) for making in makings for dtype in making.dtypes}
    changed = {(old, new) for old, new in changed if old != new}
    return {dtype_name(old): dtype_name(new) for old, new in sorted(changed, key=str)}


def placed(plan: Plan, layout: Layout) -> Iterator[tuple[TensorSpec, tuple[tuple[Region, int], ...]]]:
    """Every Megatron tensor of a plan, with its chunks and the rank that holds each."""
    known: dict[Any, tuple[tuple[Region, int], ...]] = {}
    stage_of = cache(layout.stage)
    for one, making in zip(plan.bound, plan.makings, strict=True):
        stage, shape, rule = stage_of(one.layer), making.spec.shape, one.rule
        like = shape, rule.cut, rule.blocks, stage
        if like not in known:
            cut = boxes(shape, rule.cut, rule.blocks, layout.tp)
            known[like] = tuple((region, layout.rank(stage, tp_rank)) for region, tp_rank in cut)
        yield making.spec, known[like]


def pieces(makings: Iterable[Making], *, limit: int) -> Iterator[Piece]:
    """Tensors as pieces in C order, none of more than `limit` bytes in the source's dtype or its own.

    Their numbers are written down in journals: with another order or size, `resumable` has to differ.
    """
    for making in makings:
        count = limit // max(dtype.itemsize for dtype in making.dtypes)
        for region in contiguous_regions(making.spec.shape, count):
            yield Piece(making, region)
