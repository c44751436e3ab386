"""A family's rules worked out for one model: shapes, row ranges and transforms, the same in every layer that has the same rules.

A model has hundreds of thousands of tensors and a few dozen tables. Proves that rows are covered once on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from converter import rows
from converter.model import Model
from converter.rows import RowRange
from converter.rules import Indices, Rule, alternatives, at, by_layer, counted, fill
from converter.transform import Transform, ones_of
from formats.errors import UserError
from formats.spec import Shape


@dataclass(frozen=True, slots=True)
class Table:
    """What a rule says of one model, in the layers that have the same rules."""

    rule: Rule
    shape: Shape
    """The Megatron tensor's, of one layer and one expert."""

    names: Sequence[str]
    """Templates of those of the Hugging Face tensors; none where Hugging Face has no such tensor."""

    shapes: Sequence[Shape]
    """Of the Hugging Face tensors."""

    ranges: tuple[RowRange, ...]
    """Of the Hugging Face tensors into the Megatron tensor."""

    back: Sequence[tuple[RowRange, ...]]
    """Of the Megatron tensor into each Hugging Face tensor."""

    forward: Transform | None
    backward: Transform | None
    filled: bool
    """Has Hugging Face no such tensor?"""

    owned: Sequence[bool] = ()
    """Of each Hugging Face tensor: is this the first table of the layer that names it?"""

    shared: Sequence[bool] = ()
    """Of each Hugging Face tensor: do several Megatron tensors hold its rows?"""

    is_stacked: bool = False
    """Do its Hugging Face tensors hold all experts?"""

    def owns(self, indices: Indices) -> Sequence[bool]:
        """Say of each Hugging Face tensor whether no table before names it, with these indices or those before."""
        return [False] * len(self.names) if self.is_stacked and indices["expert"] else self.owned

    def owned_by(self, indices: Indices) -> list[tuple[str, Shape]]:
        """Return the Hugging Face tensors, with their shapes, that no table before names with indices before."""
        named = zip(self.names, self.shapes, self.owns(indices), strict=True)
        return [(fill(name, indices), shape) for name, shape, owned in named if owned]


class Tables:
    """Every rule of a family that applies to a model, with its indices; gone through as often as asked for, since objects for all
    would take tens of MiB."""

    def __init__(self, rules: Iterable[Rule], model: Model) -> None:
        self._rules, self._model = tuple(rules), model
        self._plain: dict[int, Table] = {}
        self._alike: dict[tuple[Any, ...], list[Table]] = {}
        self._layers: list[tuple[list[Table], int]] = []
        """The tables of each layer, and its number: the same list for all that are alike."""

    def __iter__(self) -> Iterator[tuple[Table, Indices]]:
        if not self._layers:
            by_layers = by_layer(self._rules, self._model)
            self._layers = [(self._of_layer(active, indices), indices["layer"]) for active, indices in by_layers]
        for tables, layer in self._layers:
            for number, index in counted([table.rule for table in tables], at(self._model, layer), self._model):
                yield tables[number], index

    def _of_layer(self, active: Sequence[Rule], indices: Indices) -> list[Table]:
        absent = [rule.absent(self._model, indices) for rule in active]
        key = tuple([(id(rule), gone) for rule, gone in zip(active, absent, strict=True)])
        if key not in self._alike:
            tables = [self._without(rule) if gone else self._table(rule) for rule, gone in zip(active, absent, strict=True)]
            self._alike[key] = _joined(tables, self._model)
        return self._alike[key]

    def _table(self, rule: Rule) -> Table:
        if id(rule) not in self._plain:
            self._plain[id(rule)] = _table(rule, self._model)
        return self._plain[id(rule)]

    def _without(self, rule: Rule) -> Table:
        fill = Transform(to_megatron=True, fill=rule.fill) if rule.fill else None
        return Table(rule, rule.shape(self._model), (), (), (), (), fill, None, filled=True)


def _table(rule: Rule, model: Model) -> Table:
    ranges, shapes = tuple(rule.row_ranges(model)), rule.huggingface_shapes(model)
    back = [
        tuple(
            [
                RowRange(0, row_range.dst_row, row_range.src_row, row_range.rows, row_range.step)
                for row_range in ranges
                if row_range.part == number
            ]
        )
        for number in range(len(shapes))
    ]
    shape = rule.shape(model)
    if not rows.covered(ranges, shape[0]):
        raise _not_covered(rule, rule.megatron)
    forward = _transform(rule, model, ranges)
    backward = forward and replace(forward, to_megatron=False, offset=-forward.offset, in_order=True)
    names, stacked = alternatives(rule.huggingface), rule.is_stacked
    return Table(rule, shape, names, shapes, ranges, back, forward, backward, filled=False, is_stacked=stacked)


def _transform(rule: Rule, model: Model, ranges: Sequence[RowRange]) -> Transform | None:
    step = rows.widest(ranges)
    if not rule.is_moved and step == 1:
        return None
    plain = rule.rows_first_shapes(model)[0]
    stored = (*plain[1:], plain[0]) if rule.transposed else plain
    own = tuple(model.size(dim) for dim in rule.huggingface_shape)
    one_row = bool(own) and (1, *own) == stored
    return Transform(
        to_megatron=True,
        transposed=rule.transposed,
        stacked=rule.is_stacked,
        flat=stored[0] if rule.is_stacked and rule.flat else 0,
        ones=ones_of(own, stored) if own and not one_row else (),
        one_row=one_row,
        offset=rule.offset,
        widest=step,
    )


@dataclass(slots=True)
class _Use:
    """What the tables of one layer take of a Hugging Face tensor."""

    rows: int
    first: Table
    takes: list[tuple[Table, tuple[RowRange, ...]]] = field(default_factory=list[tuple[Table, tuple[RowRange, ...]]])

    @property
    def ranges(self) -> list[RowRange]:
        return [row_range for _, ranges in self.takes for row_range in ranges]

    @property
    def is_shared(self) -> bool:
        """Do several Megatron tensors hold its rows?"""
        return len(self.takes) > 1 or self.first.rule.is_stacked

    @property
    def in_order(self) -> bool:
        """Are its bytes read from the first to the last, by one thread after the other? Megatron tensors that share it may be
        made at the same time, or by other processes."""
        return not self.is_shared and not self.first.rule.transposed and rows.follow_one_another(self.ranges)


def _joined(tables: Sequence[Table], model: Model) -> list[Table]:
    """Say of each table of a layer which Hugging Face tensors it shares; UserError where their rows are not taken once."""
    uses: dict[str, _Use] = {}
    for table in tables:
        counts = [shape[0] for shape in table.rule.rows_first_shapes(model)] if table.names else []
        for number, (name, count) in enumerate(zip(table.names, counts, strict=True)):
            taken = tuple([row_range for row_range in table.ranges if row_range.part == number])
            uses.setdefault(name, _Use(count, table)).takes.append((table, taken))
    for name, use in uses.items():
        if not rows.exhausted(use.ranges, use.rows):
            raise _not_covered(use.first.rule, name)
    return [_with_uses(table, uses) for table in tables]


def _with_uses(table: Table, uses: dict[str, _Use]) -> Table:
    mine = [uses[name] for name in table.names]
    shared = [use.is_shared for use in mine]
    forward = table.forward
    in_order = all(use.in_order for use in mine)
    if not in_order:
        forward = replace(forward or Transform(to_megatron=True), in_order=False)
    return replace(table, forward=forward, owned=[use.first is table for use in mine], shared=shared)


def _not_covered(rule: Rule, name: str) -> UserError:
    return UserError(
        f"the rule of `{rule.megatron}` does not take each row of `{name}` once with the sizes of this model",
        hint="sizes in `config.json` do not fit together, or the family file is wrong",
    )
