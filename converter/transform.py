"""What a conversion does to a tensor beside moving rows: axes that are stored otherwise, a number that is added, a cast.

Megatron's tensors are rows first. A Hugging Face tensor may be transposed, may hold all experts, and may have axes of size 1: a
`Transform` maps regions between both, in either direction. Pure arithmetic: knows no names and no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from formats.spec import Array, Region, Shape

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Transform:
    """Map regions and values between a Hugging Face tensor and Megatron's. "Rows first" are those of one Megatron tensor."""

    to_megatron: bool
    """Is the Megatron tensor the one that is made? The other one is Hugging Face's."""

    transposed: bool = False
    """Rows are the last axis."""

    stacked: bool = False
    """A leading axis counts experts."""

    flat: int = 0
    """How many elements of the first axis each expert has, where experts follow one another along it."""

    ones: tuple[int, ...] = ()
    """Axes of size 1 that Megatron's tensor has not, by their number in Hugging Face's, of one expert."""

    one_row: bool = False
    """Hugging Face's tensor is one row, without an axis of rows."""

    offset: float = 0.0
    """Added to every value."""

    fill: float = 0.0
    """What all values are where there is no source."""

    widest: int = 1
    """The largest step between rows: a region that is read holds so many times what is taken of it."""

    in_order: bool = True
    """Does a conversion read the source's bytes from the first to the last?"""

    @property
    def moves_values(self) -> bool:
        """Are values stored elsewhere, or otherwise, than row ranges alone say?"""
        return bool(self.transposed or self.stacked or self.ones or self.one_row or self.offset or self.widest > 1)

    def stored(self, region: Region, expert: int) -> Region:
        """Return the region of the Hugging Face tensor that stores a rows-first region."""
        if self.one_row:
            return tuple(region[1:])
        axes = [*region[1:], region[0]] if self.transposed else [*region]
        for axis in self.ones:
            axes.insert(axis, slice(0, 1))
        if self.flat:
            shift = expert * self.flat
            axes[0] = slice(axes[0].start + shift, axes[0].stop + shift)
        elif self.stacked:
            axes.insert(0, slice(expert, expert + 1))
        return tuple(axes)

    def rows_first(self, region: Region, expert: int) -> Region | None:
        """Return the rows-first region that a region of the Hugging Face tensor holds of an expert; None if it holds nothing."""
        axes = [slice(0, 1), *region] if self.one_row else [*region]
        if self.flat:
            first = expert * self.flat
            axes[0] = slice(max(axes[0].start - first, 0), min(axes[0].stop - first, self.flat))
        elif self.stacked:
            experts = axes.pop(0)
            if not experts.start <= expert < experts.stop:
                return None
        axes = [axis for number, axis in enumerate(axes) if number not in self.ones]
        if any(axis.start >= axis.stop for axis in axes):
            return None
        return (axes[-1], *axes[:-1]) if self.transposed else tuple(axes)

    def view(self, values: Array) -> Array:
        """Return an array of one expert as a view that is rows first."""
        if self.one_row:
            return values[None]
        if self.stacked and not self.flat:
            values = values[0]
        values = values.squeeze(self.ones) if self.ones else values
        return np.moveaxis(values, -1, 0) if self.transposed else values

    def shifted(self, values: Array) -> Array:
        """Return values with the offset added, in double precision; as they are where there is none."""
        return values.astype(np.float64) + self.offset if self.offset else values


class Move(NamedTuple):
    """One read and where its values go: a `region` of the source, `into` an index of the piece's array."""

    source: str
    dtype: np.dtype[Any]
    region: Region
    into: Index
    rows: slice
    """Of the side that Hugging Face stores, once it is rows first: which rows are taken, or filled."""


def ones_of(shape: Shape, plain: Shape) -> tuple[int, ...]:
    """Return the axes of size 1 that `shape` has and `plain` has not.

    >>> ones_of((1, 8), (8,))
    (0,)
    """
    axes, rest = list[int](), list(plain)
    for axis, size in enumerate(shape):
        if rest and size == rest[0]:
            rest.pop(0)
        elif size == 1:
            axes.append(axis)
        else:
            break
    if rest or len(axes) + len(plain) != len(shape):
        raise ValueError(f"{list(shape)} is not {list(plain)} with axes of size 1")
    return tuple(axes)
