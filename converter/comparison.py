"""Are two checkpoints the same model? Compared tensor by tensor under their Hugging Face names, streaming, to the bit.

Whatever the format, layout and writer of either: a Megatron side is read through the plan that would export it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from converter.checks import is_zero
from converter.plan import Piece, TensorPlan, pieces
from converter.run import PIECE_BYTES, PieceBuffers, in_threads
from converter.values import target_dtype
from converter.workers import DEFAULT
from formats.arrays import same_bits
from formats.spec import Array, Reader, TensorSpec


@dataclass(frozen=True, slots=True)
class CheckpointView:
    """One checkpoint: how each of its tensors is read. `tied` are tensors it may be asked for though they are not stored;
    `zero` are stored tensors whose rows from some number on must be zero, for the model has none."""

    label: str
    reader: Reader
    tensor_plans: Mapping[str, TensorPlan]
    tied: Mapping[str, TensorPlan] = field(default_factory=dict[str, TensorPlan])
    zero: Mapping[str, int] = field(default_factory=dict[str, int])

    def cast(self, dtype: str) -> CheckpointView:
        """The same, every tensor cast."""

        def made(tensor_plans: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
            return {name: replace(one, spec=one.spec.cast(target_dtype(one.spec, dtype))) for name, one in tensor_plans.items()}

        return replace(self, tensor_plans=made(self.tensor_plans), tied=made(self.tied))

    def only(self, names: Collection[str]) -> CheckpointView:
        """Some of its tensors."""
        return replace(self, tensor_plans={name: one for name, one in self.tensor_plans.items() if name in names})

    def beside(self, other: CheckpointView) -> CheckpointView:
        """The same, with those tied tensors that the other has."""
        asked = {name: one for name, one in self.tied.items() if name in other.tensor_plans and name not in self.tensor_plans}
        return replace(self, tensor_plans={**self.tensor_plans, **asked})


@dataclass(slots=True)
class Difference:
    """How a tensor differs. `elements` that differ in any bit, the `first` of them by index, both values there, and the
    `largest` difference of two numbers, None where no two of those that differ are numbers; where shape or dtype differ, nothing
    is compared and `what` says so."""

    name: str
    what: str = ""
    elements: int = 0
    first: tuple[int, ...] = ()
    values: tuple[float, float] | tuple[()] = ()
    largest: float | None = None

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
    """What comparing two checkpoints found. Tensors by name, in the order of the first side."""

    one: str
    other: str
    tensors: int
    parameters: int
    cast: str | None
    different: list[Difference] = field(default_factory=list[Difference])
    only_in_one: list[str] = field(default_factory=list[str])
    only_in_other: list[str] = field(default_factory=list[str])

    @property
    def same(self) -> bool:
        return not (self.different or self.only_in_one or self.only_in_other)

    def lines(self) -> list[str]:
        """Everything that differs."""
        found = [str(one) for one in self.different]
        found += [f"`{name}` is only in `{self.one}`" for name in self.only_in_one]
        found += [f"`{name}` is only in `{self.other}`" for name in self.only_in_other]
        return found

    @property
    def summary(self) -> str:
        """The first of what differs; nothing if nothing does."""
        found = self.lines()
        return "; ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def compare(
    one: CheckpointView,
    other: CheckpointView,
    *,
    cast: str | None = None,
    workers: int = DEFAULT,
    progress: Callable[[int], None] = lambda _count: None,
) -> Comparison:
    """Compare every tensor of two sides, with `cast` after casting both. Reads each side once."""
    if cast:
        one, other = one.cast(cast), other.cast(cast)
    one, other = one.beside(other), other.beside(one)
    shared = [name for name in one.tensor_plans if name in other.tensor_plans]
    found = {name: what for name in shared if (what := _unlike(one.tensor_plans[name].spec, other.tensor_plans[name].spec))}
    different = {name: Difference(name, what) for name, what in found.items()}
    pairs = _Pairs(one, other, different, progress)
    comparable = [one.tensor_plans[name] for name in shared if name not in found]
    in_threads(pieces(comparable, limit=PIECE_BYTES // 2), pairs.worker, workers=workers)  # of both sides at once
    for side in (one, other):
        what = f"is not zero in `{side.label}`, where the model has nothing"
        stray = [name for name, start in side.zero.items() if not is_zero(side.reader, name, start=start)]
        different |= {name: Difference(name, what) for name in stray}
    return Comparison(
        one=one.label,
        other=other.label,
        tensors=len(shared),
        parameters=sum(prod(one.tensor_plans[name].spec.shape) for name in shared),
        cast=cast,
        different=[different[name] for name in dict.fromkeys([*one.tensor_plans, *one.zero, *other.zero]) if name in different],
        only_in_one=[name for name in one.tensor_plans if name not in other.tensor_plans],
        only_in_other=[name for name in other.tensor_plans if name not in one.tensor_plans],
    )


def _unlike(one: TensorSpec, other: TensorSpec) -> str:
    if one.stored_shape != other.stored_shape:
        return f"shape {list(one.stored_shape)} and {list(other.stored_shape)}"
    if one.stored_dtype != other.stored_dtype:
        names = one.stored_dtype, other.stored_dtype
        return f"{names[0]} and {names[1]}: `--as {names[1]}` compares after a cast"
    return ""


class _Pairs:
    """Pieces of both sides, compared; what differs is added up by tensor."""

    def __init__(
        self, one: CheckpointView, other: CheckpointView, different: dict[str, Difference], progress: Callable[[int], None]
    ) -> None:
        self._one, self._other, self._different, self._progress = one, other, different, progress
        self._lock = threading.Lock()

    def worker(self) -> Callable[[Piece], None]:
        benches = PieceBuffers(), PieceBuffers()

        def look(piece: Piece) -> None:
            name = piece.tensor.spec.name
            ours = benches[0].make(piece, self._one.reader)
            theirs = benches[1].make(Piece(self._other.tensor_plans[name], piece.region), self._other.reader)
            if not same_bits(ours, theirs):
                with self._lock:
                    _add(self._different.setdefault(name, Difference(name)), piece, ours, theirs)
            self._progress(piece.nbytes)

        return look


def _add(found: Difference, piece: Piece, one: Array, other: Array) -> None:
    plain = np.dtype(f"u{one.dtype.itemsize}")
    where = np.flatnonzero(one.view(plain).reshape(-1) != other.view(plain).reshape(-1))
    inside = np.unravel_index(int(where[0]), one.shape)
    first = tuple(part.start + int(index) for part, index in zip(piece.region, inside, strict=True))
    ours, theirs = (_numbers(side.reshape(-1)[where]) for side in (one, other))
    if not found.values or first < found.first:
        found.first, found.values = first, (float(ours[0]), float(theirs[0]))
    found.elements += len(where)
    with np.errstate(all="ignore"):
        apart: Any = np.abs(ours - theirs)
    numbers = apart[~np.isnan(apart)]
    if numbers.size:
        found.largest = max(found.largest or 0.0, float(numbers.max()))


def _numbers(values: Array) -> Array:
    """As double precision; of complex numbers their magnitudes."""
    return (np.abs(values) if values.dtype.kind == "c" else values).astype(np.float64)
