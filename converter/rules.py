"""The vocabulary of a family file: a rule ties one Megatron tensor to the Hugging Face tensors that make it.

Names are templates and are enumerated, never matched: `{layer}`, `{expert}` and `{mtp}` count, `{q,k,v}` lists alternatives in
order. A verb says both things a converter must know: how rows are ordered, and how tensor-parallel ranks divide them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby, repeat
from typing import TypedDict, Unpack

from converter import rows
from converter.model import Model

Indices = Mapping[str, int]
"""What the counters of a template stand for: `layer`, `expert` and `mtp` (multi-token prediction layers), and what follows from
them: `mixer` = 2 · layer and `mlp` = 2 · layer + 1, of families that count each half of a layer, and `after` = layers + mtp."""

Condition = Callable[[Model, Indices], bool]
Dims = tuple[str | int, ...]


def always(_model: Model, _indices: Indices) -> bool:
    return True


def never(_model: Model, _indices: Indices) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Rule:
    """See the module. `parts` are the shapes of what makes the Megatron tensor, as names of the model's sizes, rows first.

    There is one Hugging Face tensor for each part; or, where there are fewer names than parts, one tensor that holds all parts
    one after another. Where `{expert}` is in the Megatron name alone, the Hugging Face tensor holds all experts.
    """

    megatron: str
    huggingface: str
    parts: tuple[Dims, ...]
    row_order: rows.RowOrder = rows.concatenated
    partition_dim: int | None = None
    """The dimension that tensor parallelism divides (of experts, expert tensor parallelism); None where the first rank of its
    stage holds it whole."""

    partition_stride: int = 1
    """Equal blocks along `partition_dim`, each divided separately."""

    padded: bool = False
    """Zero rows follow, up to the padded vocabulary."""

    when: Condition = always
    """Does Megatron's model have this tensor?"""

    absent: Condition = never
    """Does Hugging Face's model lack it, so that all of Megatron's is `fill`?"""

    fill: float = 0.0
    transposed: bool = False
    """Hugging Face stores rows as its last axis."""

    flat: bool = False
    """Hugging Face's tensor of all experts has no axis of experts: [experts · rows, columns]."""

    huggingface_shape: Dims = ()
    """Hugging Face's own shape (of one expert), where it has axes of size 1 that Megatron's has not, or where each of its tensors
    is one row without an axis of rows."""

    offset: float = 0.0
    """Megatron's values are Hugging Face's plus this."""

    keep_dtype: str = ""
    """The dtype that Megatron's tensor always has, whatever `--dtype` asks for."""

    tied_to: str = ""
    """Where the rule does not apply, a source may still hold its Hugging Face tensor if it equals this one."""

    alias: str = ""
    """Another name some Megatron layer specs give the tensor; read, never written."""

    @property
    def is_expert(self) -> bool:
        """Is there one for each expert?"""
        return "{expert}" in self.megatron

    @property
    def is_stacked(self) -> bool:
        """Does one Hugging Face tensor hold all experts?"""
        return self.is_expert and "{expert}" not in self.huggingface

    @property
    def is_moved(self) -> bool:
        """Are Hugging Face's values stored otherwise than as rows, or not the same?"""
        return bool(self.transposed or self.is_stacked or self.huggingface_shape or self.offset)

    def names(self, indices: Indices) -> tuple[str, tuple[str, ...]]:
        """Return the Megatron name and the Hugging Face names that some indices give."""
        return fill(self.megatron, indices), tuple([fill(name, indices) for name in alternatives(self.huggingface)])

    def part_shapes(self, model: Model) -> list[tuple[int, ...]]:
        return [tuple(model.size(dim) for dim in dims) for dims in self.parts]

    def where(self, model: Model) -> list[tuple[int, int]]:
        """Return for each part the number of the Hugging Face tensor that holds it, and the part's first row there."""
        count = len(alternatives(self.huggingface))
        if count == len(self.parts):
            return [(number, 0) for number in range(count)]
        if count != 1:
            raise ValueError(f"`{self.huggingface}` has {count} names for {len(self.parts)} parts")
        counts = [shape[0] for shape in self.part_shapes(model)]
        return [(0, sum(counts[:part])) for part in range(len(counts))]

    def row_ranges(self, model: Model) -> Iterator[rows.RowRange]:
        """Yield the ranges that make the Megatron tensor; `part` is the number of the Hugging Face tensor, rows are its."""
        where = self.where(model)
        for row_range in self.row_order(tuple(shape[0] for shape in self.part_shapes(model)), model):
            number, first = where[row_range.part]
            yield (
                row_range
                if (number, first) == (row_range.part, 0)
                else replace(row_range, part=number, src_row=first + row_range.src_row)
            )

    def shape(self, model: Model) -> tuple[int, ...]:
        """Return the Megatron tensor's global shape, of one layer and one expert."""
        count = model.padded_vocab if self.padded else sum(row_range.rows for row_range in self.row_ranges(model))
        return count, *self.part_shapes(model)[0][1:]

    def rows_first_shapes(self, model: Model) -> list[tuple[int, ...]]:
        """Return for each Hugging Face tensor its shape, of one expert, as the parts have it: [rows, columns…]."""
        shapes, counts = self.part_shapes(model), dict[int, int]()
        for (number, _), shape in zip(self.where(model), shapes, strict=True):
            counts[number] = counts.get(number, 0) + shape[0]
        return [(count, *shapes[number][1:]) for number, count in counts.items()]

    def huggingface_shapes(self, model: Model) -> list[tuple[int, ...]]:
        """Return the shape of each Hugging Face tensor, as its file says it."""
        return [self._stored(shape, model) for shape in self.rows_first_shapes(model)]

    def _stored(self, shape: tuple[int, ...], model: Model) -> tuple[int, ...]:
        shape = (*shape[1:], shape[0]) if self.transposed else shape
        shape = tuple(model.size(dim) for dim in self.huggingface_shape) or shape
        if not self.is_stacked:
            return shape
        return (model.experts * shape[0], *shape[1:]) if self.flat else (model.experts, *shape)


class Options(TypedDict, total=False):
    """What any verb takes beside names and shape: see the fields of `Rule`."""

    when: Condition
    absent: Condition
    fill: float
    transposed: bool
    flat: bool
    huggingface_shape: Dims
    offset: float
    keep_dtype: str
    tied_to: str
    alias: str


def replicated(megatron: str, huggingface: str, *shape: str | int, **options: Unpack[Options]) -> Rule:
    """Return the rule of a tensor that is the same on both sides; every tensor-parallel rank holds all of it."""
    return Rule(megatron, huggingface, (shape,), **options)


def column_parallel(megatron: str, huggingface: str, *shape: str | int, **options: Unpack[Options]) -> Rule:
    """Return the rule of a tensor that is the same on both sides, its rows divided (megatron-core's ColumnParallelLinear)."""
    return Rule(megatron, huggingface, (shape,), partition_dim=0, **options)


def row_parallel(megatron: str, huggingface: str, *shape: str | int, **options: Unpack[Options]) -> Rule:
    """Return the rule of a tensor that is the same on both sides, its columns divided (megatron-core's RowParallelLinear)."""
    return Rule(megatron, huggingface, (shape,), partition_dim=1, **options)


def qkv(megatron: str, huggingface: str, *columns: str | int, **options: Unpack[Options]) -> Rule:
    """Return the rule of query, key and value projections, interleaved by query group, rows divided."""
    parts = ("queries", *columns), ("keys", *columns), ("keys", *columns)
    return Rule(megatron, huggingface, parts, rows.interleaved_by_group, partition_dim=0, **options)


def gated_mlp(megatron: str, huggingface: str, *shape: str | int, **options: Unpack[Options]) -> Rule:
    """Return the rule of a gate and then an up projection; the rows of each divided separately."""
    return Rule(megatron, huggingface, (shape, shape), partition_dim=0, partition_stride=2, **options)


def with_bias(weight: Rule, **options: Unpack[Options]) -> tuple[Rule, Rule]:
    """Return the rule of a weight, and that of its bias, which has its rows and, of these options, what it has not.

    >>> [rule.huggingface for rule in with_bias(row_parallel("mlp.linear_fc2.weight", "mlp.c_proj.weight", "hidden", "ffn"))]
    ['mlp.c_proj.weight', 'mlp.c_proj.bias']
    """
    megatron, huggingface, alias = (_of_bias(name) for name in (weight.megatron, weight.huggingface, weight.alias))
    parts, divided = tuple(dims[:1] for dims in weight.parts), 0 if weight.partition_dim == 0 else None
    bias = replace(weight, megatron=megatron, huggingface=huggingface, alias=alias, parts=parts, transposed=False)
    return weight, replace(bias, partition_dim=divided, **options)


def _of_bias(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias" if weight else ""


def vocab_parallel(megatron: str, huggingface: str, *columns: str | int, **options: Unpack[Options]) -> Rule:
    """Return the rule of a row per token, padded with zero rows, rows divided."""
    return Rule(megatron, huggingface, (("vocab", *columns),), partition_dim=0, padded=True, **options)


def sections(
    megatron: str, huggingface: str, counts: Dims, *columns: str | int, groups: str = "", **options: Unpack[Options]
) -> Iterator[Rule]:
    """Yield the rules of several Megatron tensors, `{z,x,B}`, that are the rows of one Hugging Face tensor; rows divided.

    `counts` are the rows of each. They follow one another, or with `groups`, the name of a number of groups, go group by group:
    in each, a share of every section.
    """
    parts = tuple((count, *columns) for count in counts)
    for number, name in enumerate(alternatives(megatron)):
        order = rows.share(number, groups) if groups else rows.section(number)
        yield Rule(name, huggingface, parts, order, partition_dim=0, **options)


def copy_of(huggingface: str, tied_to: str) -> Rule:
    """Return the rule of a Hugging Face tensor that a source may hold a second time, and Megatron's model never."""
    return Rule("", huggingface, ((),), when=never, tied_to=tied_to)


def under(megatron: str, huggingface: str, rules: Iterable[Rule], **options: Unpack[Options]) -> Iterator[Rule]:
    """Yield the same rules with all names prefixed, and with these options."""
    for rule in rules:
        yield replace(
            replace(rule, **options),
            megatron=f"{megatron}.{rule.megatron}",
            huggingface=f"{huggingface}.{rule.huggingface}",
            alias=rule.alias and f"{megatron}.{rule.alias}",
        )


def fill(template: str, indices: Indices) -> str:
    """Return a name with numbers in the place of its counters.

    >>> fill("layers.{layer}.experts.{expert}", {"layer": 7, "expert": 3})
    'layers.7.experts.3'
    """
    return _format(template) % indices


_COUNTERS = ("layer", "mixer", "mlp", "after", "mtp", "expert")


@cache
def _format(template: str) -> str:
    """A template as Python's `%` fills it: names are made by the hundred thousand."""
    text = template.replace("%", "%%")
    for counter in _COUNTERS:
        text = text.replace(f"{{{counter}}}", f"%({counter})d")
    return text


@cache
def alternatives(template: str) -> list[str]:
    """Return the names that a template stands for: `self_attn.{q,k}_proj` for `self_attn.q_proj` and `self_attn.k_proj`."""
    head, brace, rest = template.partition("{")
    words, _, tail = rest.partition("}")
    if not brace:
        return [template]
    if "," not in words:
        return [f"{head}{{{words}}}{other}" for other in alternatives(tail)]
    return [f"{head}{word}{tail}" for word in words.split(",")]


def words(template: str) -> list[str]:
    """Return what tells the alternatives apart: `q` and `k` of `self_attn.{q,k}_proj`; nothing where there is one name alone."""
    _, brace, rest = template.partition("{")
    inside, _, tail = rest.partition("}")
    if not brace:
        return []
    return inside.split(",") if "," in inside else words(tail)


def at(model: Model, layer: int, *, mtp: int = 0) -> Indices:
    """Return the indices of a layer. What comes before the layers counts as layer -1, what comes after as `model.layers`."""
    return {"layer": layer, "mixer": 2 * layer, "mlp": 2 * layer + 1, "mtp": mtp, "after": model.layers + mtp, "expert": 0}


def is_layered(rule: Rule) -> bool:
    """Return whether there is one in each layer of the decoder."""
    both = rule.megatron + rule.huggingface
    return "{mtp}" not in rule.megatron and any(f"{{{word}}}" in both for word in ("layer", "mixer", "mlp"))


def megatron_layer(rule: Rule, indices: Indices, model: Model) -> int:
    """Return the number of the layer, as Megatron counts them, that holds a rule's tensor; below 0 before all layers, and their
    number after them."""
    if indices["layer"] == model.layers:
        return model.megatron_layers
    return indices[_counter(rule.megatron)]


@cache
def _counter(template: str) -> str:
    """The word that stands for the number of the layer in a Megatron name."""
    return next((word for word in ("mixer", "mlp") if f"{{{word}}}" in template), "layer")


def in_order(rules: Iterable[Rule], model: Model) -> Iterator[tuple[Rule, Indices]]:
    """Yield each rule that applies with each of its indices: the order in which a model computes, and files are written."""
    for active, indices in by_layer(rules, model):
        for number, index in counted(active, indices, model):
            yield active[number], index


def by_layer(rules: Iterable[Rule], model: Model) -> Iterator[tuple[list[Rule], Indices]]:
    """Yield the rules that apply before the layers, in each layer, and after them."""
    rules = [rule for rule in rules if rule.megatron]
    layered = [number for number, rule in enumerate(rules) if is_layered(rule)]
    first, last = (layered[0], layered[-1] + 1) if layered else (len(rules), len(rules))
    yield _active(rules[:first], model, at(model, -1))
    for layer in range(model.layers if layered else 0):
        yield _active(rules[first:last], model, at(model, layer))
    yield _active(rules[last:], model, at(model, model.layers))


def _active(rules: Sequence[Rule], model: Model, indices: Indices) -> tuple[list[Rule], Indices]:
    return [rule for rule in rules if rule.when(model, indices)], indices


def counted(rules: Sequence[Rule], indices: Indices, model: Model) -> Iterator[tuple[int, Indices]]:
    """Yield the number of each rule of one layer with its indices. Rules of experts, and of multi-token prediction layers, that
    follow one another are gone through expert by expert, layer by layer."""
    if not any("{expert}" in rule.megatron or "{mtp}" in rule.megatron for rule in rules):
        yield from zip(range(len(rules)), repeat(indices), strict=False)
        return
    for is_mtp, group in groupby(range(len(rules)), lambda number: "{mtp}" in rules[number].megatron):
        numbers = list(group)
        for mtp in range(model.get("mtp", 0) if is_mtp else 1):
            yield from by_expert(rules, numbers, {**at(model, indices["layer"], mtp=mtp)} if is_mtp else indices, model)


def by_expert(rules: Sequence[Rule], numbers: Sequence[int], indices: Indices, model: Model) -> Iterator[tuple[int, Indices]]:
    """Yield the numbers of these rules of one layer with its indices: those of experts expert by expert."""
    for is_expert, group in groupby(numbers, lambda number: rules[number].is_expert):
        if not is_expert:
            yield from ((number, indices) for number in group)
            continue
        experts = list(group)
        for expert in range(model.experts):
            numbered = {**indices, "expert": expert}
            yield from ((number, numbered) for number in experts)


def tied_names(rules: Iterable[Rule], model: Model) -> dict[str, str]:
    """Return the Hugging Face tensors that a source may hold though the model has them once, each with the one that it equals."""
    ties = {
        name: rule.tied_to
        for rule in rules
        if rule.tied_to
        for mtp in (range(model.get("mtp", 0)) if "{after}" in rule.huggingface or "{mtp}" in rule.huggingface else (0,))
        if not rule.when(model, indices := at(model, model.layers, mtp=mtp))
        for name in rule.names(indices)[1]
    }
    return {name: ties.get(other, other) for name, other in ties.items()}


def layer_names(rules: Iterable[Rule], model: Model) -> Iterator[str]:
    """Yield every Hugging Face name of the model with the numbers of layer 0, once for all layers."""
    seen = set[int]()
    for active, _ in by_layer(rules, model):
        new = [rule for rule in active if id(rule) not in seen and not rule.absent(model, at(model, 0))]
        seen |= {id(rule) for rule in active}
        for number, indices in counted(new, at(model, 0), model):
            yield from new[number].names(indices)[1]


def templates(rules: Iterable[Rule], rename: Callable[[str], str]) -> tuple[Rule, ...]:
    """Return the rules with other Hugging Face names."""
    return tuple(
        replace(rule, huggingface=rename(rule.huggingface), tied_to=rule.tied_to and rename(rule.tied_to)) for rule in rules
    )


def extra_names(extras: Iterable[str], model: Model) -> set[str]:
    """Return the names that templates of extras stand for, in all layers."""
    fills = [partial(fill, template) for template in extras]
    return {filled(at(model, layer)) for filled in fills for layer in range(model.layers)}
