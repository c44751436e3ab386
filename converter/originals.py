"""Weights to which an offset is added, which rounds: a checkpoint also stores their original values, and an export restores them
where nothing changed them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from converter.model import Model
from converter.plan import TensorPlan, as_stored
from converter.planned_reader import PlannedReader
from converter.rules import Rule, in_order
from formats.errors import UserError
from formats.spec import Array, JoinedReader, Reader, Region, extent


def original_name(name: str) -> str:
    """Return the name under which the original values of a weight are stored."""
    return f"{name}.as_stored"


def original_names(rules: Iterable[Rule], model: Model) -> Iterator[str]:
    """Yield the names under which the original values of all weights of a model are stored that an offset moves."""
    for rule, indices in in_order([rule for rule in rules if rule.offset], model):
        yield from map(original_name, rule.names(indices)[1])


def moved(tensor_plans: Iterable[TensorPlan]) -> dict[str, TensorPlan]:
    """Return the plans of weights that an offset moves, by the names of what they make."""
    return {
        tensor_plan.spec.name: tensor_plan
        for tensor_plan in tensor_plans
        if tensor_plan.transform and tensor_plan.transform.offset
    }


def with_originals(tensor_plans: Sequence[TensorPlan], tensors: Reader) -> tuple[Sequence[TensorPlan], Reader]:
    """Return the plans of a Hugging Face model's tensors with the values that travelled, where they still hold, and their reader.

    `tensors` reads a checkpoint and what travelled. Raises UserError where that has another shape than the weight.
    """
    planned = {name: tensor_plan for name, tensor_plan in moved(tensor_plans).items() if original_name(name) in tensors.specs}
    if not planned:
        return tensor_plans, tensors
    reader = OriginalReader(tensors, planned)
    again = as_stored(reader.specs)
    return [again.get(tensor_plan.spec.name, tensor_plan) for tensor_plan in tensor_plans], JoinedReader(tensors, reader)


class OriginalReader:
    """Weights that an offset moved: what travelled where that, moved again, is what the checkpoint holds; else computed."""

    def __init__(self, tensors: Reader, tensor_plans: Mapping[str, TensorPlan]) -> None:
        self._tensors, self._offsets = tensors, dict[str, float]()
        held = dict[str, TensorPlan]()
        for name, tensor_plan in tensor_plans.items():
            assert tensor_plan.transform is not None
            self._offsets[name] = tensor_plan.transform.offset
            held[name] = replace(
                tensor_plan,
                spec=tensor_plan.spec.cast(tensor_plan.parts[0].dtype),
                transform=replace(tensor_plan.transform, offset=0.0),
            )
        self._computed, self._held = PlannedReader(tensors, tensor_plans), PlannedReader(tensors, held)
        self.specs = self._computed.specs
        for name, spec in self.specs.items():
            if (travelled := tensors.specs[original_name(name)]).shape != spec.shape:
                raise UserError(f"`{travelled.name}` has the shape {list(travelled.shape)}, and `{name}` {list(spec.shape)}")

    def read(self, name: str, region: Region, out: Array) -> None:
        travelled = self._tensors.specs[original_name(name)]
        original = np.empty(extent(region), travelled.dtype)
        self._tensors.read(travelled.name, region, original)
        held = np.empty(extent(region), self._held.specs[name].dtype)
        self._held.read(name, region, held)
        self._computed.read(name, region, out)
        with np.errstate(all="ignore"):
            again = (original.astype(np.float64) - self._offsets[name]).astype(held.dtype)
            np.copyto(out, original.astype(out.dtype), where=_bits(again) == _bits(held))

    def close(self) -> None:
        pass


def _bits(values: Array) -> Array:
    return values.view(f"u{values.dtype.itemsize}")
