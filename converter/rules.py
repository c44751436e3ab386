"""The vocabulary of a family file: a rule ties one Megatron tensor to the Hugging Face tensors that make it.

Names are templates and are enumerated, never matched: `{layer}` counts, `{q,k,v}` lists alternatives in order. A verb says
both things a converter must know: how rows are ordered, and how tensor-parallel ranks divide them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TypedDict, Unpack

from converter import rows
from converter.model import Model

Condition = Callable[[Model], bool]
Dims = tuple[str, ...]


def always(_model: Model) -> bool:
    return True


def never(_model: Model) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Rule:
    """See the module. `parts` are the shapes of the Hugging Face tensors, as names of `Model`'s sizes."""

    megatron: str
    huggingface: str
    parts: tuple[Dims, ...]
    row_order: rows.RowOrder
    partition_dim: int | None
    """The dimension that tensor parallelism divides; None where the first rank of its stage holds it whole."""

    partition_stride: int = 1
    """Equal blocks along `cut`, each divided separately."""

    padded: bool = False
    """Zero rows follow, up to the padded vocabulary."""

    when: Condition = always
    """Does Megatron's model have this tensor?"""

    absent: Condition = never
    """Does Hugging Face's model lack it, so that Megatron's must be zero?"""

    tied_to: str = ""
    """Where the rule does not apply, a source may still hold its Hugging Face tensor if it equals this one."""

    alias: str = ""
    """Another name some Megatron layer specs give the tensor; read, never written."""

    def names(self, layer: int) -> tuple[str, tuple[str, ...]]:
        """The Megatron name and the Hugging Face names in one layer."""
        return fill(self.megatron, layer), tuple([fill(name, layer) for name in alternatives(self.huggingface)])

    def part_shapes(self, model: Model) -> list[tuple[int, ...]]:
        return [tuple(model.size(dim) for dim in dims) for dims in self.parts]

    def shape(self, model: Model) -> tuple[int, ...]:
        """The Megatron tensor's global shape, one layer of it."""
        parts = self.part_shapes(model)
        total = model.padded_vocab if self.padded else sum(shape[0] for shape in parts)
        return total, *parts[0][1:]

    def row_ranges(self, model: Model) -> Iterator[rows.RowRange]:
        return self.row_order(tuple(shape[0] for shape in self.part_shapes(model)), model)


class Options(TypedDict, total=False):
    """What any verb takes beside names and shape: see the fields of `Rule`."""

    when: Condition
    absent: Condition
    tied_to: str
    alias: str


def replicated(megatron: str, huggingface: str, *shape: str, **options: Unpack[Options]) -> Rule:
    """The same tensor on both sides; every tensor-parallel rank holds all of it."""
    return Rule(megatron, huggingface, (shape,), rows.concatenated, None, **options)


def row_parallel(megatron: str, huggingface: str, *shape: str, **options: Unpack[Options]) -> Rule:
    """The same tensor on both sides, its columns divided (megatron-core's RowParallelLinear)."""
    return Rule(megatron, huggingface, (shape,), rows.concatenated, 1, **options)


def qkv(megatron: str, huggingface: str, *columns: str, **options: Unpack[Options]) -> Rule:
    """Query, key and value projections, interleaved by query group, rows divided."""
    parts = ("queries", *columns), ("keys", *columns), ("keys", *columns)
    return Rule(megatron, huggingface, parts, rows.interleaved_by_group, 0, **options)


def gated_mlp(megatron: str, huggingface: str, *shape: str, **options: Unpack[Options]) -> Rule:
    """Gate then up projection; the rows of each divided separately."""
    return Rule(megatron, huggingface, (shape, shape), rows.concatenated, 0, partition_stride=2, **options)


def vocab_parallel(megatron: str, huggingface: str, *columns: str, **options: Unpack[Options]) -> Rule:
    """A row per token, padded with zero rows, rows divided."""
    return Rule(megatron, huggingface, (("vocab", *columns),), rows.concatenated, 0, padded=True, **options)


def under(megatron: str, huggingface: str, rules: Iterable[Rule]) -> Iterator[Rule]:
    """The same rules with all names prefixed."""
    for rule in rules:
        yield replace(
            rule,
            megatron=f"{megatron}.{rule.megatron}",
            huggingface=f"{huggingface}.{rule.huggingface}",
            alias=rule.alias and f"{megatron}.{rule.alias}",
        )


def fill(template: str, layer: int) -> str:
    return template.replace("{layer}", str(layer))


@cache
def alternatives(template: str) -> list[str]:
    """`self_attn.{q,k}_proj` stands for `self_attn.q_proj` and `self_attn.k_proj`."""
    head, brace, rest = template.partition("{")
    words, _, tail = rest.partition("}")
    if not brace:
        return [template]
    if "," not in words:
        return [f"{head}{{{words}}}{other}" for other in alternatives(tail)]
    return [f"{head}{word}{tail}" for word in words.split(",")]


def words(template: str) -> list[str]:
    """What tells the alternatives apart: `q` and `k` of `self_attn.{q,k}_proj`; nothing where there is one name alone."""
    _, brace, rest = template.partition("{")
    inside, _, tail = rest.partition("}")
    if not brace:
        return []
    return inside.split(",") if "," in inside else words(tail)


def in_order(rules: Iterable[Rule], model: Model) -> Iterator[tuple[Rule, int]]:
    """Each rule with each of its layers: the order in which a model computes, and files are written.

    What comes before the layers counts as layer -1, what comes after them as layer `model.layers`.
    """
    rules = list(rules)
    counted = [number for number, rule in enumerate(rules) if "{layer}" in rule.megatron]
    first, last = counted[0], counted[-1] + 1
    yield from ((rule, -1) for rule in rules[:first])
    for layer in range(model.layers):
        yield from ((rule, layer) for rule in rules[first:last])
    yield from ((rule, model.layers) for rule in rules[last:])
