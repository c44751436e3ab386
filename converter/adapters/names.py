"""The modules of a model that can have adapters: Megatron's names and PEFT's, enumerated from the family's rules.

The adapter of a Megatron module has the row table of the module's weight: the rows of B and of the magnitude have the order of
the weight's rows. A has no such rows, and all Hugging Face weights of the module share it. Reads no files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import partial

from converter.model import Model
from converter.rows import RowRange, concatenated
from converter.rules import Indices, Rule, at, counted, is_layered, words
from formats.errors import UserError
from formats.torch_dist import MOST_LAYERS


class Factor(Enum):
    """The tensors of one adapter: A [rank, in], B [out, rank], and DoRA's magnitude [out], the norms of the rows.

    Each value is the ending of Megatron's name and of PEFT's.
    """

    A = "linear_in.weight", "lora_A.weight"
    B = "linear_out.weight", "lora_B.weight"
    MAGNITUDE = "weight_magnitude", "lora_magnitude_vector"

    def shape(self, rows: int, columns: int, rank: int) -> tuple[int, ...]:
        """Return the shape for a weight of [rows, columns].

        >>> Factor.A.shape(64, 32, 4), Factor.B.shape(64, 32, 4), Factor.MAGNITUDE.shape(64, 32, 4)
        ((4, 32), (64, 4), (64,))
        """
        return {Factor.A: (rank, columns), Factor.B: (rows, rank), Factor.MAGNITUDE: (rows,)}[self]


def factors(method: str) -> tuple[Factor, ...]:
    """Return the tensors that an adapter of a method has."""
    return (Factor.A, Factor.B, Factor.MAGNITUDE) if method == "dora" else (Factor.A, Factor.B)


PREFIX = "base_model.model."
WEIGHT = ".weight"


def peft_name(weight: str, factor: Factor) -> str:
    """Return PEFT's name for a tensor of the adapter of a Hugging Face weight, or of a module.

    >>> peft_name("lm_head.weight", Factor.A)
    'base_model.model.lm_head.lora_A.weight'
    """
    return f"{PREFIX}{module_of(weight)}.{factor.value[1]}"


def module_of(weight: str) -> str:
    """Return the name of the module that a weight belongs to.

    >>> module_of("model.layers.0.self_attn.q_proj.weight")
    'model.layers.0.self_attn.q_proj'
    """
    return weight.removesuffix(WEIGHT)


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One possible Megatron adapter in one layer, and the Hugging Face weights that it changes."""

    prefix: str
    """The beginning of its tensors' names."""

    target: str
    """Its name in `target_modules`, with its layer: `decoder.layers.0.self_attention.linear_q`. All experts of a layer
    have the same."""

    weights: tuple[str, ...]
    rows: tuple[int, ...]
    """The rows of each of the weights."""

    columns: int
    row_ranges: Callable[[], Iterable[RowRange]]
    """From the weights' rows to those of the adapter. Check sizes against stored tensors before calling this."""

    transposed: bool = False
    """Whether the weights are stored as [in, out] (transformers' Conv1D). A and B are as for a linear layer."""

    is_stacked: bool = False
    """Whether the weight is that of one expert in a tensor of all: a parameter for PEFT, not a module."""

    @property
    def module(self) -> str:
        """The Megatron module that it is attached to. A module may have several adapters."""
        return self.prefix.partition(".adapter")[0]

    def is_chosen(self, patterns: Iterable[str], excluded: Iterable[str], *, parts: Sequence[str] = ()) -> bool:
        """Return whether `target_modules` requests it and `exclude_modules` does not. A module's name means all its adapters.

        `parts`: the names of parts that may be requested on their own, such as `q` in `linear_q`.
        """
        names = (*self._in_model(), *(part_of(self.target, part, parts) for part in parts))
        wanted, unwanted = (any(fits(pattern, name) for pattern in each for name in names) for each in (patterns, excluded))
        return wanted and not unwanted

    def _in_model(self) -> tuple[str, ...]:
        """Return the names in a running model of the module and of the adapter. Those of experts depend on whether one layer has
        several."""
        names, expert = (EXPERTS.sub(".experts.", self.module), self.target), EXPERTS.search(self.module)
        alone = (name.replace(".experts.", f".experts.local_experts.{expert[1]}.") for name in names if expert)
        return (*names, *alone)

    def name(self, factor: Factor) -> str:
        return f"{self.prefix}.{factor.value[0]}"

    def shape(self, factor: Factor, rank: int) -> tuple[int, ...]:
        return factor.shape(sum(self.rows), self.columns, rank)


EXPERTS = re.compile(r"\.experts\.(\d+)\.")
"""The number of an expert in a name of a checkpoint."""


def adapted_modules(rules: Iterable[Rule], model: Model, *, canonical: bool) -> Iterator[AdaptedModule]:
    """Yield every possible adapter of a model, layer by layer.

    `canonical`: separate adapters for the parts of a fused module, otherwise one for each Megatron module. Raises UserError for
    a number of layers that is too large to enumerate.
    """
    if model.layers > MOST_LAYERS:
        raise UserError(f"`config.json` says {model.layers} layers, more than any model has", hint="it is damaged")
    linear = [rule for rule in rules if is_linear(rule)]
    for layer in range(model.layers):
        active = [rule for rule in linear if rule.when(model, at(model, layer))]
        for number, indices in counted(active, at(model, layer), model):
            yield from (
                _separate(active[number], indices, model) if canonical else [describe_module(active[number], indices, model)]
            )


def fits(pattern: str, name: str) -> bool:
    """Return whether a pattern of `target_modules` chooses a module. `*` matches any text.

    A pattern without a dot is matched against the last part of the name.

    >>> fits("linear_q*", "decoder.layers.0.self_attention.linear_qkv"), fits("*.layers.1.*", "decoder.layers.0.mlp.linear_fc1")
    (True, False)
    """
    return fnmatchcase(name if "." in pattern else name.rpartition(".")[2], pattern)


def is_linear(rule: Rule) -> bool:
    """Return whether a rule is for the weight of a linear layer of the decoder, stored as [out, in] or as [in, out]. A norm over
    each head has two dimensions too.

    Rows of all experts in one matrix (DBRX) are no linear layers: for PEFT they have one A, and Megatron has one for each expert.
    """
    return is_matrix(rule) and is_layered(rule) and not rule.flat


def is_matrix(rule: Rule) -> bool:
    """Return whether a rule is for the weight of a linear layer, of the decoder or of layers after it."""
    has_matrices = len(rule.parts[0]) == 2 and not rule.huggingface_shape and "norm" not in module_of(rule.megatron)
    is_inside = is_layered(rule) or "{mtp}" in rule.megatron
    return is_inside and has_matrices and rule.megatron.endswith(WEIGHT) and not rule.offset


def weights_of(rule: Rule, indices: Indices) -> tuple[str, ...]:
    """Return the names of the Hugging Face weights of one expert, or of a layer without experts. Where a tensor holds all experts
    along an axis of their own, the weight is named as in Python: `model.layers.0.mlp.experts.down_proj[3]`."""
    names = rule.names(indices)[1]
    return tuple(f"{name}[{indices['expert']}]" for name in names) if rule.is_stacked and not rule.flat else names


def describe_module(rule: Rule, indices: Indices, model: Model) -> AdaptedModule:
    """Return the adapter of the whole Megatron module that a rule describes."""
    megatron, weights = rule.names(indices)[0], weights_of(rule, indices)
    module, shapes = module_of(megatron), rule.rows_first_shapes(model)
    rows = tuple(shape[0] for shape in shapes)
    row_ranges = partial(rule.row_ranges, model)
    target = EXPERTS.sub(".experts.", module)
    return AdaptedModule(f"{module}.adapter", target, weights, rows, shapes[0][1], row_ranges, rule.transposed, rule.is_stacked)


def _separate(rule: Rule, indices: Indices, model: Model) -> Iterator[AdaptedModule]:
    """Yield one adapter for each part of a rule that has several Hugging Face tensors."""
    fused, parts = describe_module(rule, indices, model), part_names(rule)
    if not parts:
        yield fused
        return
    for word, weight, rows in zip(parts, fused.weights, fused.rows, strict=True):
        target = part_of(fused.target, word, parts)
        row_ranges = partial(concatenated, (rows,), model)
        prefix = f"{fused.prefix}.adapter_{word}"
        yield AdaptedModule(prefix, target, (weight,), (rows,), fused.columns, row_ranges, rule.transposed)


def part_of(target: str, part: str, parts: Sequence[str]) -> str:
    """Return the name of a part of a fused module.

    >>> part_of("linear_qkv", "q", ["q", "k", "v"]), part_of("linear_fc1", "up", ["gate", "up"])
    ('linear_q', 'linear_fc1_up')
    """
    return f"{target.removesuffix(''.join(parts)).removesuffix('_')}_{part}"


def part_names(rule: Rule) -> Sequence[str]:
    """Return the names of the parts in `mbtrain`'s `adapter_…`; by default the words that distinguish the rule's templates."""
    names = words(rule.huggingface)
    known = PARTS.get(module_of(rule.megatron).rpartition(".")[2], ())
    return known if len(known) == len(names) else names


PARTS = {"linear_qkv": ("q", "k", "v"), "linear_fc1": ("gate", "up")}
"""The parts of fused modules that may have adapters of their own."""


def targets(modules: Iterable[AdaptedModule], every: Iterable[AdaptedModule]) -> tuple[str, ...]:
    """Return `target_modules` for exactly these modules of `every`: last names if all of such a name are meant, otherwise whole
    names, with `*` for the number that experts may have in a running model."""
    names = dict.fromkeys(module.target for module in modules)
    others = {_last(module.target) for module in every if module.target not in names}
    last = dict.fromkeys(_last(name) for name in names)
    return tuple(last) if not others & last.keys() else tuple(name.replace(".experts.", ".experts.*") for name in names)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
