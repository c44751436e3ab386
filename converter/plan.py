"""What a conversion does, as data: the tensors it makes, the rows of others that make each, and the pieces they are moved in.

`planner.py` makes it from a family's rules. Reads no tensor data.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np

from converter.rows import RowRange
from converter.transform import Move, Transform
from formats.arrays import contiguous_regions
from formats.errors import UserError
from formats.spec import DTYPES, Region, TensorSpec, dtype_name, extent, intersect

Specs = Mapping[str, TensorSpec]

PIECE_AXES = "every leading axis"
"""How tensors are cut into pieces, as journals say it: up to mbtools 0.1 it was along the first alone, and not said."""

PLAN_FORMAT = 2
"""How plans are written down in the names of what interrupted runs leave: 1 knew no steps between rows, and no transforms."""


class RowCopy(NamedTuple):
    """Rows from `src_row` on of a source tensor become rows from `dst_row` on of a target tensor."""

    source: str
    dtype: np.dtype[Any]
    """The source's; its values are cast where it is not the target's."""

    src_row: int
    dst_row: int
    rows: int


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One target tensor, and the ranges of rows of `parts` that make it; rows that no range covers are zero.

    Tensors that are made alike in every layer share their ranges. With a `transform`, rows are counted once each side is rows
    first.
    """

    spec: TensorSpec
    parts: tuple[TensorSpec, ...] = ()
    ranges: Sequence[RowRange] = ()
    experts: Sequence[int] = ()
    """Of each part, the expert that its rows are of in Hugging Face's tensor, where that holds all experts."""

    transform: Transform | None = None

    @property
    def copies(self) -> Iterator[RowCopy]:
        """The ranges, each with the tensor it is of. UserError where axes are moved on the way, and rows alone say nothing."""
        if self.transform and self.transform.moves_values and self.parts:
            raise UserError(f"`{self.spec.name}` is stored in another form there, which is not supported here")
        for rows in self.ranges:
            part = self.parts[rows.part]
            yield RowCopy(part.name, part.dtype, rows.src_row, rows.dst_row, rows.rows)

    @property
    def sources(self) -> dict[str, np.dtype[Any]]:
        """The tensors it is made of, with their dtypes."""
        return {part.name: part.dtype for part in self.parts}

    @property
    def dtypes(self) -> set[np.dtype[Any]]:
        """Those of its sources and its own."""
        return {self.spec.dtype, *[part.dtype for part in self.parts]}

    @property
    def reads_in_order(self) -> bool:
        """Does making it read each source's bytes in order, after those that other tensors take? What is hashed as it passes has
        to."""
        return self.transform is None or self.transform.in_order

    @property
    def fill(self) -> float:
        """What rows have that no range covers."""
        return self.transform.fill if self.transform else 0.0


def same_tensor(spec: TensorSpec, part: TensorSpec) -> TensorPlan:
    """Return the plan of a tensor that is another, or as many of its first rows as it has; or has those rows, and then zeros."""
    return TensorPlan(spec, (part,), _all_rows(min(spec.shape[0], part.shape[0]) if spec.shape else 1))


@cache
def _all_rows(rows: int) -> tuple[RowRange, ...]:
    return (RowRange(0, 0, 0, rows),)


def as_stored(specs: Mapping[str, TensorSpec]) -> dict[str, TensorPlan]:
    """Return the plans of tensors that are read as they are."""
    return {name: same_tensor(spec, spec) for name, spec in specs.items()}


class Piece(NamedTuple):
    """A part of a target tensor that is one run of bytes, small enough to hold in memory: the unit of work.

    Whole rows, or where one row is too large a part of one (see `contiguous_regions`).
    """

    tensor: TensorPlan
    region: Region

    @property
    def rows(self) -> slice:
        return self.region[0]

    @property
    def nbytes(self) -> int:
        return prod(extent(self.region)) * self.tensor.spec.dtype.itemsize

    def copies(self) -> Iterator[tuple[RowCopy, Region, slice | EllipsisType]]:
        """Yield what is copied, the source's region, and the piece's rows that it fills: `...` where it has no dimensions."""
        if not self.region:
            yield from ((copy, (), ...) for copy in self.tensor.copies)
            return
        rows, rest = self.region[0], self.region[1:]
        for copy in self.tensor.copies:
            start, stop = max(rows.start, copy.dst_row), min(rows.stop, copy.dst_row + copy.rows)
            if start < stop:
                shift = copy.src_row - copy.dst_row
                yield copy, (slice(start + shift, stop + shift), *rest), slice(start - rows.start, stop - rows.start)

    def moves(self, transform: Transform) -> Iterator[Move]:
        """Yield what is read and where it goes, for a tensor with a transform."""
        if transform.to_megatron:
            yield from self._moves_to_megatron(transform)
        else:
            yield from self._moves_to_huggingface(transform)

    def _moves_to_megatron(self, transform: Transform) -> Iterator[Move]:
        rows, rest = self.region[0], self.region[1:]
        for row_range in self.tensor.ranges:
            start, stop = max(rows.start, row_range.dst_row), min(rows.stop, row_range.dst_row + row_range.rows)
            if start >= stop:
                continue
            part = self.tensor.parts[row_range.part]
            expert = self.tensor.experts[row_range.part] if self.tensor.experts else 0
            first, count = row_range.src_row + (start - row_range.dst_row) * row_range.step, stop - start
            region = transform.stored((slice(first, first + (count - 1) * row_range.step + 1), *rest), expert)
            into = (slice(start - rows.start, stop - rows.start),)
            yield Move(part.name, part.dtype, region, into, slice(0, None, row_range.step))

    def _moves_to_huggingface(self, transform: Transform) -> Iterator[Move]:
        for number, expert in self._experts(transform):
            rows_first = transform.rows_first(self.region, expert)
            if rows_first is None:
                continue
            window = intersect(transform.stored(rows_first, expert), self.region)
            assert window is not None
            into = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(window, self.region, strict=True))
            yield from self._rows_of(number, rows_first, into)

    def _rows_of(self, number: int, rows_first: Region, into: tuple[slice, ...]) -> Iterator[Move]:
        """Yield what a part gives to the region `rows_first` of the tensor that is made."""
        part, rows, ranges = self.tensor.parts[number], rows_first[0], self.tensor.ranges
        for at in range(bisect_left(ranges, number, key=_part_of), len(ranges)):
            row_range = ranges[at]
            if row_range.part != number:
                break
            first = max(0, -(-(rows.start - row_range.dst_row) // row_range.step))
            last = min(row_range.rows, -(-(rows.stop - row_range.dst_row) // row_range.step))
            if first < last:
                region = (slice(row_range.src_row + first, row_range.src_row + last), *rows_first[1:])
                start = row_range.dst_row + first * row_range.step - rows.start
                stop = start + (last - first - 1) * row_range.step + 1
                yield Move(part.name, part.dtype, region, into, slice(start, stop, row_range.step))

    def _experts(self, transform: Transform) -> Iterable[tuple[int, int]]:
        """The parts that may have something of the piece, each with its expert."""
        experts = self.tensor.experts
        if not experts:
            return ((number, 0) for number in range(len(self.tensor.parts)))
        first, last = self.region[0].start, self.region[0].stop - 1
        if transform.flat:
            first, last = first // transform.flat, last // transform.flat
        held = range(bisect_left(experts, first), bisect_left(experts, last + 1))
        return ((number, experts[number]) for number in held)


def _part_of(row_range: RowRange) -> int:
    return row_range.part


def pieces(tensor_plans: Iterable[TensorPlan], *, limit: int) -> Iterator[Piece]:
    """Yield tensors as pieces in C order, none of more than `limit` bytes in the source's dtype or its own.

    Their numbers are written down in journals: with another order or size, `resumable` has to differ.
    """
    for tensor_plan in tensor_plans:
        count = limit // max(dtype.itemsize for dtype in tensor_plan.dtypes)
        count //= tensor_plan.transform.widest if tensor_plan.transform else 1
        for region in contiguous_regions(tensor_plan.spec.shape, count):
            yield Piece(tensor_plan, region)


def casts(tensor_plans: Iterable[TensorPlan]) -> dict[str, str]:
    """Return the dtypes that values are cast from, each with what it is cast to."""
    changed = {(dtype, tensor_plan.spec.dtype) for tensor_plan in tensor_plans for dtype in tensor_plan.dtypes}
    changed = {(old, new) for old, new in changed if old != new}
    return {dtype_name(old): dtype_name(new) for old, new in sorted(changed, key=str)}


def casts_of_kept(kept: Sequence[TensorPlan]) -> Iterator[str]:
    """Yield a note for each cast of tensors that Megatron keeps in a dtype of their own."""
    for old, new in casts(kept).items():
        cast = [tensor_plan.spec.name for tensor_plan in kept if casts([tensor_plan]) == {old: new}]
        yield f"{list_names(cast)} are cast from {old} to {new}: Megatron keeps them in another dtype than the rest"


def check_dtypes(specs: Specs) -> None:
    """Raise UserError for tensors of a dtype that can only be reported and compared."""
    for spec in specs.values():
        if spec.stored_dtype not in DTYPES:
            raise UserError(
                f"`{spec.name}` is {spec.stored_dtype}, which cannot be converted",
                hint=f"those that can be are {', '.join(DTYPES)}; convert the weights to one of these first",
            )


def list_names(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are: for messages."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more
