"""The parameters of all experts of a layer that transformers 5 has and PEFT adapts, enumerated from the family's rules.

Files have the same tensors (GPT-OSS, Llama 4, Granite), or a weight for each expert. Reads no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from converter.adapters.names import Factor, is_linear, weights_of
from converter.model import Model
from converter.rules import Rule, at, fill

IN_ORDER = {"experts": ("gate_up_proj", "up_proj", "down_proj"), "experts.mlp": ("w1", "v1", "w2")}
"""The parameters of transformers' modules of all experts, in the order in which they define them: PEFT wraps the first one first.
The last are DBRX's."""

_NUMBER = ".{expert}"


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """One parameter of all experts of a layer, and the weights in files that it is made of."""

    name: str
    """`model.layers.0.mlp.experts.gate_up_proj`"""

    weights: tuple[tuple[str, ...], ...]
    """For each expert the names of its weights, whose rows follow one another."""

    rows: tuple[int, ...]
    """The rows of each of an expert's weights."""

    columns: int

    tensor: str = ""
    """The tensor in files that holds all of them; empty where there is one for each expert."""

    swapped: bool = False
    """Whether PEFT takes the parameter's inputs for outputs: its A is then Bᵀ of the weights, and its B their Aᵀ. `rows` and
    `columns` are of what PEFT takes it for."""

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    def stored(self, factor: Factor) -> Factor:
        """Return which tensor of a weight is a tensor of the parameter's, and of the parameter which is a weight's."""
        return {Factor.A: Factor.B, Factor.B: Factor.A}[factor] if self.swapped else factor


def fused_experts(rules: Iterable[Rule], model: Model) -> Iterator[FusedExperts]:
    """Yield the parameters of experts of all layers, in transformers' order."""
    experts = [rule for rule in rules if rule.is_expert and is_linear(rule)]
    for layer in range(model.layers if experts else 0):
        indices = at(model, layer)
        for rule in experts:
            if not rule.when(model, indices):
                continue
            name, shapes = in_transformers(fill(_parameter(rule), indices)), rule.rows_first_shapes(model)
            weights = tuple(weights_of(rule, {**indices, "expert": expert}) for expert in range(model.experts))
            tensor = fill(rule.huggingface, indices) if rule.is_stacked else ""
            rows, columns = tuple(shape[0] for shape in shapes), shapes[0][1]
            swapped = rule.transposed and _UNMARKED in name
            if swapped:
                rows, columns = (columns,), sum(rows)
            yield FusedExperts(name, weights, rows, columns, tensor, swapped)


_UNMARKED = ".feed_forward.experts."
"""Llama 4's parameters are [experts, in, out], as GPT-OSS's are. GPT-OSS's module says so, with `is_transposed`; Llama 4's does
not, and PEFT takes them for [experts, out, in]."""


def _parameter(rule: Rule) -> str:
    """Return the parameter of a rule of experts: the tensor of all, or where files have one for each, transformers' name."""
    if rule.is_stacked:
        return rule.huggingface
    name = "down_proj" if rule.partition_dim == 1 else "gate_up_proj" if len(rule.parts) > 1 else "up_proj"
    return f"{rule.huggingface.partition(_NUMBER)[0]}.{name}"


_IN_TRANSFORMERS = {
    ".block_sparse_moe.input_linear.weight": ".block_sparse_moe.experts.gate_up_proj",
    ".block_sparse_moe.output_linear.weight": ".block_sparse_moe.experts.down_proj",
    ".block_sparse_moe.router.layer.": ".block_sparse_moe.router.",
    ".block_sparse_moe.": ".mlp.",
}


def in_transformers(name: str) -> str:
    """Return the name that transformers 5 has for a module or parameter of Mixtral's and Granite's files (its
    `conversion_mapping.py`).

    >>> in_transformers("model.layers.0.block_sparse_moe.gate.weight")
    'model.layers.0.mlp.gate.weight'
    """
    old = next((old for old in _IN_TRANSFORMERS if old in name), "")
    return name.replace(old, _IN_TRANSFORMERS[old]) if old else name
