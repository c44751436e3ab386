"""Where adapters stand beside a model's linear layers: Megatron's names and PEFT's, enumerated from the family's rules.

An adapter of a Megatron module has the row table of the module's weight: of B and of the magnitude, rows lie as the weight's
do; A has none of them and is shared by all Hugging Face weights the module is made of. Reads no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import partial

from converter.model import Model
from converter.rows import RowRange, concatenated
from converter.rules import Indices, Rule, alternatives, at, words
from formats.errors import UserError
from formats.torch_dist import MOST_LAYERS


class Factor(Enum):
    """The tensors of one adapter: a [rank, in] that comes first, a [out, rank] that follows, DoRA's [out] lengths of rows.
    Values are the endings of Megatron's names and of PEFT's."""

    A = "linear_in.weight", "lora_A.weight"
    B = "linear_out.weight", "lora_B.weight"
    MAGNITUDE = "weight_magnitude", "lora_magnitude_vector"

    def shape(self, rows: int, columns: int, rank: int) -> tuple[int, ...]:
        """Beside a weight of [rows, columns]."""
        return {Factor.A: (rank, columns), Factor.B: (rows, rank), Factor.MAGNITUDE: (rows,)}[self]


def factors(method: str) -> tuple[Factor, ...]:
    """Those an adapter of a method has."""
    return (Factor.A, Factor.B, Factor.MAGNITUDE) if method == "dora" else (Factor.A, Factor.B)


PREFIX = "base_model.model."
WEIGHT = ".weight"


def peft_name(weight: str, factor: Factor) -> str:
    """What PEFT calls a tensor of the adapter of a Hugging Face weight."""
    return f"{PREFIX}{weight.removesuffix(WEIGHT)}.{factor.value[1]}"


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """Where one Megatron adapter stands in one layer, and the Hugging Face weights that it changes."""

    prefix: str
    """What its tensors' names begin with."""

    target: str
    """The name that `target_modules` knows it by, with its layer: `decoder.layers.0.self_attention.linear_q`."""

    weights: tuple[str, ...]
    rows: tuple[int, ...]
    """Of each of the weights."""

    columns: int
    runs: Callable[[], Iterable[RowRange]]
    """From the weights' rows to those of the adapter. Sizes should be held against real tensors before this is asked."""

    @property
    def module(self) -> str:
        """The Megatron module that it stands beside, which may have several."""
        return self.prefix.partition(".adapter")[0]

    def is_chosen(self, patterns: Iterable[str], excluded: Iterable[str]) -> bool:
        """Do a description's `target_modules` ask for it? The name of its module stands for all of the module's."""
        names = (self.module, self.target)
        wanted, unwanted = (any(fits(one, name) for one in each for name in names) for each in (patterns, excluded))
        return wanted and not unwanted

    def name(self, factor: Factor) -> str:
        return f"{self.prefix}.{factor.value[0]}"

    def shape(self, factor: Factor, rank: int) -> tuple[int, ...]:
        return factor.shape(sum(self.rows), self.columns, rank)


def adapted_modules(rules: Iterable[Rule], model: Model, *, canonical: bool) -> Iterator[AdaptedModule]:
    """Every place of a model that an adapter may have, in the order of its layers.

    `canonical`: separate ones for what Megatron fuses; otherwise one for each of its modules. UserError for more layers than
    could be counted through.
    """
    if model.layers > MOST_LAYERS:
        raise UserError(f"`config.json` says {model.layers} layers, more than any model has", hint="it is damaged")
    linear = [rule for rule in rules if is_linear(rule)]
    for layer in range(model.layers):
        indices = at(model, layer)
        for rule in linear:
            if rule.when(model, indices):
                yield from _separate(rule, indices, model) if canonical else [_fused(rule, indices, model)]


def fits(pattern: str, name: str) -> bool:
    """Does a pattern of `target_modules` choose a module? One without a dot is for its last name; `*` stands for any text."""
    return fnmatchcase(name if "." in pattern else name.rpartition(".")[2], pattern)


def is_linear(rule: Rule) -> bool:
    """Is it the weight of a linear layer in the decoder?"""
    plain = not rule.is_expert and not rule.is_moved and len(alternatives(rule.huggingface)) == len(rule.parts)
    return "{layer}" in rule.megatron and len(rule.parts[0]) == 2 and plain


def _fused(rule: Rule, indices: Indices, model: Model) -> AdaptedModule:
    megatron, weights = rule.names(indices)
    module, shapes = megatron.removesuffix(WEIGHT), rule.part_shapes(model)
    rows = tuple(shape[0] for shape in shapes)
    return AdaptedModule(f"{module}.adapter", module, weights, rows, shapes[0][1], partial(rule.row_ranges, model))


def _separate(rule: Rule, indices: Indices, model: Model) -> Iterator[AdaptedModule]:
    """One place per part; parts are called by the words that tell them apart in the rule."""
    whole, parts = _fused(rule, indices, model), words(rule.huggingface)
    if not parts:
        yield whole
        return
    for word, weight, rows in zip(parts, whole.weights, whole.rows, strict=True):
        target = f"{whole.target.removesuffix(''.join(parts)).removesuffix('_')}_{word}"
        alone = partial(concatenated, (rows,), model)
        yield AdaptedModule(f"{whole.prefix}.adapter_{word}", target, (weight,), (rows,), whole.columns, alone)


def targets(found: Iterable[AdaptedModule], *, layers: int) -> tuple[str, ...]:
    """What `target_modules` says of these places: their last names where all of those are in every layer, else whole names."""
    whole = [place.target for place in found]
    counts = Counter(target.rpartition(".")[2] for target in whole)
    return tuple(counts) if set(counts.values()) == {layers} else tuple(whole)
