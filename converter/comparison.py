"""Compare two checkpoints tensor by tensor, to the bit, under their Hugging Face names, a piece at a time.

Formats, layouts and writers may differ: a Megatron checkpoint is read through the plan that would export it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from converter.checks import is_filled
from converter.plan import Piece, TensorPlan, pieces
from converter.run import PIECE_BYTES, PieceBuffers, in_threads
from converter.values import target_dtype
from converter.workers import DEFAULT
from formats.arrays import same_bits
from formats.spec import Array, Reader, TensorSpec


@dataclass(frozen=True, slots=True)
class CheckpointView:
    """One checkpoint: how each of its tensors is read, under Hugging Face names."""

    label: str
    reader: Reader
    tensor_plans: Mapping[str, TensorPlan]
    tied: Mapping[str, TensorPlan] = field(default_factory=dict[str, TensorPlan])
    """Tensors that are not stored and equal a stored one: read if the other checkpoint stores them."""

    zero: Mapping[str, int] = field(default_factory=dict[str, int])
    """Stored tensors whose rows from a number on must be zero, as the model has none there."""

    filled: Mapping[str, float] = field(default_factory=dict[str, float])
    """Stored tensors that must hold one number everywhere, as the model has none."""

    side_tensors: Collection[str] = ()
    """Its tensors that belong to dequantized weights, such as scales: compared if the other checkpoint has them too."""

    schemes: str = ""
    """How its weights are quantized, if they are viewed as the numbers that they mean."""

    def cast(self, dtype: str) -> CheckpointView:
        """Return the same view with every tensor but the side tensors cast to a dtype."""

        def cast(tensor_plan: TensorPlan) -> TensorPlan:
            if tensor_plan.spec.name in self.side_tensors:
                return tensor_plan
            return replace(tensor_plan, spec=tensor_plan.spec.cast(target_dtype(tensor_plan.spec, dtype)))

        tensor_plans = {name: cast(tensor_plan) for name, tensor_plan in self.tensor_plans.items()}
        return replace(self, tensor_plans=tensor_plans, tied={name: cast(tied) for name, tied in self.tied.items()})

    def only(self, names: Collection[str]) -> CheckpointView:
        """Return a view of these tensors alone."""
        tensor_plans = {name: tensor_plan for name, tensor_plan in self.tensor_plans.items() if name in names}
        return replace(self, tensor_plans=tensor_plans)

    def without_scales_unless(self, other: CheckpointView) -> CheckpointView:
        """Return the same view without the side tensors that the `other` lacks."""
        names = self.tensor_plans.keys() - (set(self.side_tensors) - other.tensor_plans.keys())
        return self.only(names) if self.side_tensors else self

    def with_ties_of(self, other: CheckpointView) -> CheckpointView:
        """Return the same view with those tied tensors that the `other` stores."""
        needed = other.tensor_plans.keys() - self.tensor_plans.keys()
        tied = {name: tensor_plan for name, tensor_plan in self.tied.items() if name in needed}
        return replace(self, tensor_plans={**self.tensor_plans, **tied})


@dataclass(slots=True)
class Difference:
    """How a tensor differs between two checkpoints."""

    name: str
    what: str = ""
    """The difference in shape or dtype; values are then not compared."""

    elements: int = 0
    """How many elements differ in any bit."""

    first: tuple[int, ...] = ()
    """The index of the first of them."""

    values: tuple[float, float] | tuple[()] = ()
    """Both values there."""

    largest: float | None = None
    """The largest difference; None if all elements that differ are NaN on a side."""

    def __str__(self) -> str:
        if self.what:
            return f"`{self.name}`: {self.what}"
        one, other = self.values or (0.0, 0.0)
        largest = "no two of them numbers" if self.largest is None else f"largest difference {self.largest!r}"
        return (
            f"`{self.name}`: {'1 element differs' if self.elements == 1 else f'{self.elements} elements differ, first'} "
            f"at {list(self.first)}: {one!r} and {other!r}, {largest}"
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing two checkpoints. Tensors are named in the order of the first."""

    one: str
    other: str
    tensors: int
    parameters: int
    cast: str | None
    schemes: dict[str, str] = field(default_factory=dict[str, str])
    """How weights are quantized that were compared as the numbers that they mean, by checkpoint."""

    different: list[Difference] = field(default_factory=list[Difference])
    only_in_one: list[str] = field(default_factory=list[str])
    only_in_other: list[str] = field(default_factory=list[str])

    @property
    def same(self) -> bool:
        return not (self.different or self.only_in_one or self.only_in_other)

    def lines(self) -> list[str]:
        """Return everything that differs, a line for each tensor."""
        lines = [str(difference) for difference in self.different]
        lines += [f"`{name}` is only in `{self.one}`" for name in self.only_in_one]
        lines += [f"`{name}` is only in `{self.other}`" for name in self.only_in_other]
        return lines

    @property
    def summary(self) -> str:
        """The first three differences; empty if there are none."""
        lines = self.lines()
        return "; ".join(lines[:3]) + (f" and {len(lines) - 3} more" if len(lines) > 3 else "")


def compare(
    one: CheckpointView,
    other: CheckpointView,
    *,
    cast: str | None = None,
    workers: int = DEFAULT,
    progress: Callable[[int], None] = lambda _count: None,
) -> Comparison:
    """Compare every tensor of two checkpoints, with `cast` after casting both. Reads each once.

    `progress` is called on `workers` threads with the bytes that were compared.
    """
    if cast:
        one, other = one.cast(cast), other.cast(cast)
    one, other = one.with_ties_of(other), other.with_ties_of(one)
    one, other = one.without_scales_unless(other), other.without_scales_unless(one)
    shared = [name for name in one.tensor_plans if name in other.tensor_plans]
    unlike = {name: what for name in shared if (what := _unlike(one.tensor_plans[name].spec, other.tensor_plans[name].spec))}
    different = {name: Difference(name, what) for name, what in unlike.items()}
    pairs = _Pairs(one, other, different, progress)
    comparable = [one.tensor_plans[name] for name in shared if name not in unlike]
    in_threads(pieces(comparable, limit=PIECE_BYTES // 2), pairs.worker, workers=workers)  # a piece of each is in memory
    for view in (one, other):
        what = f"is not zero in `{view.label}`, where the model has nothing"
        nonzero = [name for name, start in view.zero.items() if not is_filled(view.reader, name, 0, start=start)]
        different |= {name: Difference(name, what) for name in nonzero}
        different |= {
            name: Difference(name, f"is not {value:g} everywhere in `{view.label}`, where the model has nothing")
            for name, value in view.filled.items()
            if not is_filled(view.reader, name, value)
        }
    return Comparison(
        one=one.label,
        other=other.label,
        tensors=len(shared),
        parameters=sum(prod(one.tensor_plans[name].spec.shape) for name in shared),
        cast=cast,
        schemes={view.label: view.schemes for view in (one, other) if view.schemes},
        different=[different[name] for name in _order(one, other) if name in different],
        only_in_one=[name for name in one.tensor_plans if name not in other.tensor_plans],
        only_in_other=[name for name in other.tensor_plans if name not in one.tensor_plans],
    )


def _order(one: CheckpointView, other: CheckpointView) -> dict[str, None]:
    """The names that may differ, in the order in which they are reported."""
    return dict.fromkeys([*one.tensor_plans, *one.zero, *one.filled, *other.zero, *other.filled])


def _unlike(one: TensorSpec, other: TensorSpec) -> str:
    """Return how shape or dtype differ, if they do."""
    if one.stored_shape != other.stored_shape:
        return f"shape {list(one.stored_shape)} and {list(other.stored_shape)}"
    if one.stored_dtype != other.stored_dtype:
        names = one.stored_dtype, other.stored_dtype
        return f"{names[0]} and {names[1]}: `--cast-to {names[1]}` compares after a cast"
    return ""


class _Pairs:
    """Compares pieces of both checkpoints, and sums the differences by tensor."""

    def __init__(
        self, one: CheckpointView, other: CheckpointView, different: dict[str, Difference], progress: Callable[[int], None]
    ) -> None:
        self._one, self._other, self._different, self._progress = one, other, different, progress
        self._lock = threading.Lock()

    def worker(self) -> Callable[[Piece], None]:
        """Return the function that compares pieces on one thread."""
        buffers = PieceBuffers(), PieceBuffers()

        def compare_piece(piece: Piece) -> None:
            name = piece.tensor.spec.name
            one = buffers[0].make(piece, self._one.reader)
            other = buffers[1].make(Piece(self._other.tensor_plans[name], piece.region), self._other.reader)
            if not same_bits(one, other):
                with self._lock:
                    _add(self._different.setdefault(name, Difference(name)), piece, one, other)
            self._progress(piece.nbytes)

        return compare_piece


def _add(difference: Difference, piece: Piece, one: Array, other: Array) -> None:
    """Add to a tensor's difference that of a piece, given the piece's values in both checkpoints."""
    bits = np.dtype(f"u{one.dtype.itemsize}")
    where = np.flatnonzero(one.view(bits).reshape(-1) != other.view(bits).reshape(-1))
    inside = np.unravel_index(int(where[0]), one.shape)
    first = tuple(part.start + int(index) for part, index in zip(piece.region, inside, strict=True))
    values, others = (_numbers(side.reshape(-1)[where]) for side in (one, other))
    if not difference.values or first < difference.first:
        difference.first, difference.values = first, (float(values[0]), float(others[0]))
    difference.elements += len(where)
    with np.errstate(all="ignore"):
        distances: Any = np.abs(values - others)
    numbers = distances[~np.isnan(distances)]
    if numbers.size:
        difference.largest = max(difference.largest or 0.0, float(numbers.max()))


def _numbers(values: Array) -> Array:
    """Return values in double precision; of complex numbers their magnitudes."""
    return (np.abs(values) if values.dtype.kind == "c" else values).astype(np.float64)
