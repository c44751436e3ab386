"""From a family's rules and a source's tensor list to everything one conversion does.

Planning reads no tensor data. It accounts for every tensor on both sides, or says which it cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from converter.layout import Layout, boxes
from converter.model import Model
from converter.rules import Rule, fill, in_order
from converter.values import target_dtype
from formats.arrays import contiguous_regions
from formats.errors import UserError
from formats.spec import Region, TensorSpec, dtype_name, extent

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


@dataclass(frozen=True, slots=True)
class Making:
    """One target tensor and the copies that make it; rows that no copy covers are zero."""

    spec: TensorSpec
    copies: tuple[Copy, ...]

    @property
    def dtypes(self) -> set[np.dtype[Any]]:
        """Those of its sources and its own."""
        return {self.spec.dtype, *(copy.dtype for copy in self.copies)}


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
    return [Bound(rule, layer, *rule.names(layer)) for rule, layer in in_order(rules, model) if rule.when(model)]


def to_megatron(rules: Sequence[Rule], extras: Iterable[str], model: Model, source: Specs, *, dtype: str) -> Plan:
    """The plan that makes every Megatron tensor of `model` from Hugging Face tensors."""
    bound = bind(rules, model, source)
    wanted = {name: shape for one in bound if not one.rule.zeros(model) for name, shape in _parts(one, model)}
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
    makings = [_fused(one, model, source, common, dtype) for one in bound]
    zero = [one.megatron for one in bound if one.rule.zeros(model)]
    present = sorted(allowed & source.keys())
    for name in present:
        if not source[name].shape:
            raise UserError(f"`{name}` has no dimensions", hint="it should hold a number for each pair of channels")
    return Plan(tuple(makings), tuple(bound), tuple(present), tuple(equal), tuple(zero))


def _fused(one: Bound, model: Model, source: Specs, common: np.dtype[Any], dtype: str) -> Making:
    shape = one.rule.shape(model)
    if one.rule.zeros(model):
        target = target_dtype(TensorSpec(one.megatron, shape, common), dtype)
        return Making(TensorSpec(one.megatron, shape, target), ())
    parts = [source[name] for name in one.huggingface]
    targets = [target_dtype(part, dtype) for part in parts]
    for part, target in zip(parts, targets, strict=True):
        if target != targets[0]:
            raise _unequal_dtypes(parts[0], part, one.megatron)
    copies = tuple(_copy(parts[run.part], run.there, run.here, run.count) for run in one.rule.runs(model))
    return Making(TensorSpec(one.megatron, shape, targets[0]), copies)


def _copy(spec: TensorSpec, there: int, here: int, count: int) -> Copy:
    return Copy(spec.name, spec.dtype, there, here, count)


def to_huggingface(rules: Sequence[Rule], model: Model, source: Specs, *, dtype: str) -> Plan:
    """The plan that makes every Hugging Face tensor of `model` from Megatron tensors."""
    bound = [_as_stored(one, source) for one in bind(rules, model, source)]
    wanted = {one.megatron: _stored_shape(one, model, source) for one in bound}
    _account(wanted, source, known=set(), side="checkpoint")
    zero = tuple(one.megatron for one in bound if one.rule.zeros(model))
    makings = [making for one in bound if one.megatron not in zero for making in _split(one, model, source, dtype)]
    return Plan(tuple(makings), tuple(bound), zero=zero)


def _split(one: Bound, model: Model, source: Specs, dtype: str) -> Iterator[Making]:
    spec, runs = source[one.megatron], list(one.rule.runs(model))
    for part, (name, shape) in enumerate(_parts(one, model)):
        copies = tuple(_copy(spec, run.here, run.there, run.count) for run in runs if run.part == part)
        yield Making(TensorSpec(name, shape, target_dtype(spec, dtype)), copies)


def _as_stored(one: Bound, source: Specs) -> Bound:
    """The same, under the name that this checkpoint's writer gave it."""
    other = fill(one.rule.also, one.layer)
    return Bound(one.rule, one.layer, other, one.huggingface) if one.megatron not in source and other in source else one


def _stored_shape(one: Bound, model: Model, source: Specs) -> tuple[int, ...]:
    """The shape a stored tensor should have: any padding of the vocabulary will do."""
    shape = one.rule.shape(model)
    stored = source.get(one.megatron)
    if one.rule.padded and stored and len(stored.shape) == len(shape) and stored.shape[0] >= model.vocab:
        return stored.shape[0], *shape[1:]
    return shape


def _parts(one: Bound, model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    return zip(one.huggingface, one.rule.part_shapes(model), strict=True)


def _account(wanted: Mapping[str, tuple[int, ...]], found: Specs, *, known: set[str], side: str) -> None:
    """Nothing missing, nothing left over, every shape as it should be."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(
            f"the {side} lacks {named(missing)}",
            hint="`config.json` describes a model with these tensors: either it or the weights are of another model",
        )
    over = sorted(found.keys() - wanted.keys() - known)
    if over:
        raise UserError(
            f"the {side} holds {named(over)}, for which this family has no place",
            hint="nothing is left out silently: is `config.json` of the same model?",
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise UserError(
                f"`{name}` has shape {list(found[name].shape)}, by `config.json` it should be {list(shape)}",
                hint="either the weights or `config.json` are of another model",
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
    changed = {(copy.dtype, making.spec.dtype) for making in makings for copy in making.copies}
    changed = {(old, new) for old, new in changed if old != new}
    return {dtype_name(old): dtype_name(new) for old, new in sorted(changed, key=str)}


def placed(plan: Plan, layout: Layout) -> Iterator[tuple[TensorSpec, tuple[tuple[Region, int], ...]]]:
    """Every Megatron tensor of a plan, with its chunks and the rank that holds each."""
    for one, making in zip(plan.bound, plan.makings, strict=True):
        stage = layout.stage(one.layer)
        cut = boxes(making.spec.shape, one.rule.cut, one.rule.blocks, layout.tp)
        yield making.spec, tuple((region, layout.rank(stage, tp_rank)) for region, tp_rank in cut)


def pieces(makings: Iterable[Making], *, limit: int) -> Iterator[Piece]:
    """Tensors as pieces in C order, none of more than `limit` bytes in the source's dtype or its own.

    Their numbers are written down in journals: with another order or size, `resumable` has to differ.
    """
    for making in makings:
        count = limit // max(dtype.itemsize for dtype in making.dtypes)
        for region in contiguous_regions(making.spec.shape, count):
            yield Piece(making, region)
