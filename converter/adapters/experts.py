"""Adapters of experts, in the two layouts that PEFT's files have: a module for each expert, or one parameter for all of a layer.

transformers 5 has a layer's experts in parameters `gate_up_proj` and `down_proj` [experts, out, in], which PEFT adapts with
`target_parameters`: A [experts · rank, in] goes expert by expert, B [out, rank · experts] rank by rank, with all experts of each
(`ParamWrapper` in PEFT's `tuners/lora/layer.py`). The inner parameter's tensors are under `base_layer`. vLLM calls this the 3-D
layout, and that of a module for each expert, `experts.3.gate_proj`, the 2-D one (its documentation of LoRA adapters). Files of
models, transformers 4 and rules have a weight for each expert, or one tensor of all (`converter.adapters.parameters`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from converter.adapters.adapter import AdapterReader
from converter.adapters.merged import RecentValues
from converter.adapters.names import WEIGHT, Factor, is_linear, module_of, peft_name
from converter.adapters.parameters import FusedExperts, fused_experts, in_transformers
from converter.model import Model
from converter.plan import TensorPlan, same_tensor
from converter.planned_reader import PlannedReader
from converter.rules import Rule, at
from formats.errors import UserError
from formats.spec import Array, Reader, Region, TensorSpec


class ComputedReader:
    """Tensors computed whole from those of another reader, beside its own under new names."""

    def __init__(
        self, reader: Reader, stored: Mapping[str, str], computed: Iterable[TensorSpec], compute: Callable[[str], Array]
    ) -> None:
        """`stored`: the new names of the reader's own tensors, and their names there."""
        self._reader, self._stored, self._values = reader, stored, RecentValues(compute)
        self.specs = {name: replace(reader.specs[old], name=name) for name, old in stored.items()}
        self.specs |= {spec.name: spec for spec in computed}

    def read(self, name: str, region: Region, out: Array) -> None:
        if name in self._stored:
            self._reader.read(self._stored[name], region, out)
        else:
            out[...] = self._values.get(name)[region]

    def close(self) -> None:
        self._reader.close()


def _read(reader: Reader, spec: TensorSpec) -> Array:
    out = np.empty(spec.shape, spec.dtype)
    reader.read(spec.name, spec.full_region, out)
    return out


@dataclass(frozen=True, slots=True)
class _Share:
    """Where a tensor of one expert is in that of all."""

    source: TensorSpec
    factor: Factor
    """Which of the parameter's tensors that is."""

    expert: int
    experts: int
    rows: slice
    """Of B, the rows of the weight among those of the expert's."""

    part: int = 0
    parts: int = 1
    """Of the expert's ranks, which of how many equal parts."""

    swapped: bool = False
    """See `FusedExperts`."""

    @property
    def shape(self) -> tuple[int, int]:
        rank = self.source.shape[0 if self.factor is Factor.A else 1] // self.experts // self.parts
        rows, columns = (rank, self.source.shape[1]) if self.factor is Factor.A else (self.rows.stop - self.rows.start, rank)
        return (columns, rows) if self.swapped else (rows, columns)

    def of(self, whole: Array) -> Array:
        """Return the tensor of the expert's weight."""
        share = self._of_a(whole) if self.factor is Factor.A else self._of_b(whole)
        return share.T if self.swapped else share

    def _of_a(self, whole: Array) -> Array:
        ranks = whole.reshape(self.experts, self.parts, -1, whole.shape[1])
        return ranks[self.expert, self.part]

    def _of_b(self, whole: Array) -> Array:
        ranks = whole[self.rows].reshape(self.rows.stop - self.rows.start, self.parts, -1, self.experts)
        return ranks[:, self.part, :, self.expert]


def separate(
    adapter: AdapterReader, rules: Collection[Rule], model: Model, *, by_part: bool = False
) -> tuple[AdapterReader, dict[str, str]]:
    """Return an adapter of PEFT with the tensors of each expert on their own, under the names of rules, and for each module so
    named the parameter that it is in.

    `by_part`: where a parameter's adapter was made of one for gate and one for up, return these, which have half its rank.
    Raises UserError for an adapter of another number of experts or other sizes.
    """
    fused, renamed = list(fused_experts(rules, model)), _renamed(rules, model)
    weights = {weight: experts.name for experts in fused for names in experts.weights for weight in names}
    _refuse_others(adapter.parts.keys() - weights.keys() - set(weights.values()))
    parted = {experts.name for experts in fused if by_part and _has_parts(experts, adapter)}
    parameters = weights | {weight: name for name, weight in renamed.items()}
    adapter = replace(adapter, is_requested=_requested(adapter.is_requested, parameters))
    present = [experts for experts in fused if experts.name in adapter.parts]
    shares = {name: share for experts in present for name, share in _shares(experts, adapter, by_part=experts.name in parted)}
    if shares or renamed.keys() & adapter.parts.keys():
        adapter = _with_shares(adapter, shares, weights, renamed)
    return adapter, {module_of(weight): name for weight, name in parameters.items() if name not in parted}


def _refuse_others(names: Iterable[str]) -> None:
    """Raise UserError for a parameter of experts that is no tensor for each expert in the family's files."""
    name = min((name for name in names if not name.endswith(WEIGHT)), default="")
    if name:
        raise UserError(
            f"the adapter changes `{name}`, a parameter of all experts that this family does not store expert by expert",
            hint="merge it with PEFT (`merge_and_unload`) and convert the merged model",
        )


def _requested(requested: Callable[[str], bool], parameters: Mapping[str, str]) -> Callable[[str], bool]:
    """Return whether a configuration requests a weight, by its own name or by that of a parameter."""

    def either(weight: str) -> bool:
        return requested(weight) or requested(parameters.get(weight, weight))

    return either


def _with_shares(
    adapter: AdapterReader, shares: Mapping[str, _Share], weights: Mapping[str, str], renamed: Mapping[str, str]
) -> AdapterReader:
    """Return an adapter with the tensors of single experts, and with the names of rules for `renamed` weights.

    `weights`: those of experts, and the parameters that they are in.
    """
    single = {renamed.get(name, name): name for name in adapter.parts.keys() - set(weights.values())}
    stored = {peft_name(weight, factor): plan.spec.name for weight, name in single.items()
              for factor, plan in adapter.parts[name].items()}  # fmt: skip
    specs = [TensorSpec(name, share.shape, share.source.dtype) for name, share in shares.items()]
    reader = ComputedReader(adapter.reader, stored, specs, _taken_from(adapter.reader, shares))
    parts = {weight: _plans(weight, reader.specs) for weight in (*single, *weights)}
    scales = {weight: adapter.scales[single.get(weight) or weights[weight]] for weight, plans in parts.items() if plans}
    return replace(adapter, reader=reader, parts={weight: parts[weight] for weight in sorted(scales)}, scales=scales)


def _plans(weight: str, specs: Mapping[str, TensorSpec]) -> dict[Factor, TensorPlan]:
    """Return the tensors that there are of a weight, as they are."""
    named = {factor: specs[name] for factor in Factor if (name := peft_name(weight, factor)) in specs}
    return {factor: same_tensor(spec, spec) for factor, spec in named.items()}


def _taken_from(reader: Reader, shares: Mapping[str, _Share]) -> Callable[[str], Array]:
    """Return the function that takes a tensor of one expert from those of all, which are read once for many."""
    whole = RecentValues[Array](lambda name: _read(reader, reader.specs[name]))
    return lambda name: np.ascontiguousarray(shares[name].of(whole.get(shares[name].source.name)))


def _renamed(rules: Iterable[Rule], model: Model) -> dict[str, str]:
    """Return the weights of modules that transformers 5 has under another name than files, by that name."""
    named = {name for rule in rules if is_linear(rule) and not rule.is_expert for layer in range(model.layers)
             for name in rule.names(at(model, layer))[1]}  # fmt: skip
    return {in_transformers(name): name for name in named if in_transformers(name) != name}


def _has_parts(experts: FusedExperts, adapter: AdapterReader) -> bool:
    """Return whether the adapter of a parameter has the rank of two, with the scale of one, and B is zero where their rows and
    ranks do not meet."""
    if experts.name not in adapter.parts or len(experts.rows) == 1 or adapter.scales[experts.name] != adapter.description.scale:
        return False
    spec, count = adapter.parts[experts.name][Factor.B].spec, len(experts.rows)
    if spec.shape != (sum(experts.rows), adapter.description.dim * count * len(experts.weights)):
        return False
    blocks = _read(adapter.reader, spec).reshape(count, experts.rows[0], count, -1)
    return not any(blocks[part, :, other].any() for part in range(count) for other in range(count) if part != other)


def _shares(layer: FusedExperts, adapter: AdapterReader, *, by_part: bool) -> Iterator[tuple[str, _Share]]:
    a, b = (adapter.parts[layer.name][factor].spec for factor in (Factor.A, Factor.B))
    experts, width = len(layer.weights), len(layer.weights) * adapter.ranks[layer.name]
    if a.shape != (width, layer.columns) or b.shape != (sum(layer.rows), width):
        raise UserError(
            f"`{a.name}` has shape {list(a.shape)} and `{b.name}` {list(b.shape)}, which by `config.json` should be "
            f"{[width, layer.columns]} and {[sum(layer.rows), width]}, of {experts} experts",
            hint="is the base the model that the adapter was trained on?",
        )
    parts, firsts = len(layer.rows) if by_part else 1, [sum(layer.rows[:part]) for part in range(len(layer.rows))]
    for expert, names in enumerate(layer.weights):
        for number, weight in enumerate(names):
            rows, part = slice(firsts[number], firsts[number] + layer.rows[number]), number if by_part else 0
            for factor, spec in ((Factor.A, a), (Factor.B, b)):
                share = _Share(spec, factor, expert, experts, rows, part, parts, layer.swapped)
                yield peft_name(weight, layer.stored(factor)), share


@dataclass(frozen=True, slots=True)
class Fused:
    """The adapter of one parameter of all experts, made of the adapters of their weights."""

    experts: FusedExperts
    adapted: tuple[int, ...]
    """The numbers of those of an expert's weights that have adapters."""

    shared: bool
    """Whether they have the same A."""

    rank: int
    """Of one weight's adapter."""

    prefix: str
    """PEFT's name of the module: `model.layers.0.mlp.experts.base_layer`."""

    @property
    def first(self) -> str:
        """The first expert's first weight that has an adapter."""
        return self.experts.weights[0][self.adapted[0]]

    @property
    def total_rank(self) -> int:
        """The rank of the whole: that of each A one after another, unless they are the same."""
        return self.rank if self.shared else self.rank * len(self.adapted)

    def specs(self, dtype: np.dtype[Any]) -> dict[Factor, TensorSpec]:
        """Return the tensors."""
        width = self.total_rank * len(self.experts.weights)
        shapes = {Factor.A: (width, self.experts.columns), Factor.B: (sum(self.experts.rows), width)}
        return {factor: TensorSpec(peft_name(self.prefix, factor), shape, dtype) for factor, shape in shapes.items()}

    def compute(self, factor: Factor, reader: Reader) -> Array:
        """Read the tensors of all experts, and return theirs together; rows of B that no A is for are zero."""
        if factor is Factor.A:
            kept = self.adapted[:1] if self.shared else self.adapted
            return np.concatenate([self._of(weights[part], factor, reader) for weights in self.experts.weights for part in kept])
        count, rows = len(self.experts.weights), self.experts.rows
        blocks = [[self._of(names[part], factor, reader) for part in self.adapted] for names in self.experts.weights]
        out = np.zeros((sum(rows), self.total_rank * count), blocks[0][0].dtype)
        for expert, of_expert in enumerate(blocks):
            for number, (part, block) in enumerate(zip(self.adapted, of_expert, strict=True)):
                first, column = sum(rows[:part]), 0 if self.shared else number * self.rank * count
                out[first : first + rows[part], column + expert : column + self.rank * count : count] = block
        return out

    def _of(self, weight: str, factor: Factor, reader: Reader) -> Array:
        """Read what is a weight's of the tensor of all."""
        values = _read(reader, reader.specs[peft_name(weight, self.experts.stored(factor))])
        return values.T if self.experts.swapped else values


def fuse(adapter: AdapterReader, reader: Reader, rules: Iterable[Rule], model: Model) -> tuple[AdapterReader, list[Fused]]:
    """Return an adapter with the tensors of all experts of a layer together, and what those are. `reader` has `adapter`'s tensors
    under PEFT's names.

    Raises UserError if some experts of a layer have adapters and others do not.
    """
    fused = _fused_of(adapter, fused_experts(rules, model))
    every = {weight for layer in fused for names in layer.experts.weights for weight in names}
    single = {in_transformers(weight): weight for weight in adapter.parts if weight not in every}
    stored = {peft_name(new, factor): plan.spec.name for new, weight in single.items()
              for factor, plan in adapter.parts[weight].items()}  # fmt: skip
    dtype = next(iter(adapter.tensor_plans.values())).spec.dtype
    computed = {spec.name: (layer, factor, spec) for layer in fused for factor, spec in layer.specs(dtype).items()}

    def compute(name: str) -> Array:
        layer, factor, _ = computed[name]
        return layer.compute(factor, reader)

    together = ComputedReader(reader, stored, (spec for *_, spec in computed.values()), compute)
    parts = {name: _plans(name, together.specs) for name in single}
    parts |= {
        layer.experts.name: {factor: same_tensor(spec, spec) for factor, spec in layer.specs(dtype).items()} for layer in fused
    }
    return replace(adapter, reader=together, parts=parts), fused


def in_stacks(adapter: AdapterReader, single: Collection[Rule], stacked: Collection[Rule], model: Model) -> AdapterReader:
    """Return an adapter with the tensors of each expert's part of a tensor of all, in place of those of the weights in it.

    `single`: the rules of these weights; `stacked`: those of the same model with one tensor of all experts. Raises UserError for
    a DoRA of experts, and unless the weights of a layer's experts have one rank and one scale.
    """
    reader = PlannedReader(adapter.reader, adapter.tensor_plans)
    together, fused = fuse(adapter, reader, single, model)
    for layer in fused:
        _check_alike(layer, adapter)
    scales = {name: adapter.scales[name] for name in together.parts if name in adapter.scales}
    scales |= {layer.experts.name: adapter.scales[layer.first] for layer in fused}
    ranks = {layer.experts.name: layer.total_rank for layer in fused}
    result, _ = separate(replace(together, scales=scales, ranks=ranks), stacked, model)
    layers = zip(fused_experts(single, model), fused_experts(stacked, model), strict=True)
    inside = {whole: weights for one, other in layers for weights, (whole,) in zip(one.weights, other.weights, strict=True)}

    def is_requested(weight: str) -> bool:
        return result.is_requested(weight) or any(map(adapter.is_requested, inside.get(weight, ())))

    return replace(result, is_requested=is_requested)


_SAVE_SINGLE = "transformers' `save_pretrained` writes such a base with a weight for each expert: merge into that"


def _check_alike(layer: Fused, adapter: AdapterReader) -> None:
    """Raise UserError for adapters of single experts that are none of the tensor of all."""
    if adapter.description.method == "dora":
        raise UserError(
            f"the adapter is a DoRA of `{layer.first}`, and the base has one tensor of all experts, into which none is merged",
            hint=_SAVE_SINGLE,
        )
    for weights in layer.experts.weights:
        for weight in (weights[part] for part in layer.adapted):
            rank = adapter.parts[weight][Factor.A].spec.shape[0]
            if (rank, adapter.scales[weight]) != (layer.rank, adapter.scales[layer.first]):
                raise UserError(
                    f"`{weight}` and `{layer.first}` have adapters of different ranks or scales, and the base has one tensor "
                    "for both",
                    hint=_SAVE_SINGLE,
                )


def _fused_of(adapter: AdapterReader, every: Iterable[FusedExperts]) -> list[Fused]:
    present = [experts for experts in every if any(weight in adapter.parts for names in experts.weights for weight in names)]
    levels = {experts.module: [other.name for other in present if other.module == experts.module] for experts in present}
    return [_fuse_one(experts, adapter, levels[experts.module]) for experts in present]


def _fuse_one(experts: FusedExperts, adapter: AdapterReader, names: list[str]) -> Fused:
    adapted = tuple(part for part, weight in enumerate(experts.weights[0]) if weight in adapter.parts)
    for weights in experts.weights:
        for part, weight in enumerate(weights):
            if (weight in adapter.parts) != (part in adapted):
                raise UserError(
                    f"`{weight}` has {'an' if part not in adapted else 'no'} adapter, and that of the first expert has "
                    f"{'none' if part not in adapted else 'one'}: PEFT has one for all experts of a layer, `{experts.name}`",
                    hint="is the checkpoint complete?" if experts.tensor else "`--experts separate` writes a module for each",
                )
    prefix = experts.module + ".base_layer" * (len(names) - 1 - names.index(experts.name))
    shared = len(adapted) == len(experts.rows) and not adapter.description.canonical
    rank = adapter.parts[experts.weights[0][adapted[0]]][Factor.A].spec.shape[0]
    return Fused(experts, adapted, shared, rank, prefix)
