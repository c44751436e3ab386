"""Where megatron-core's distributed optimizer keeps each parameter of a rank: the map from its flat buckets, by arithmetic.

A rank's parameters fill buckets in the reverse of the order in which the model registers them, each from a multiple of 64
elements on. A checkpoint says how many elements each bucket has without the padding at its end, and the parameters must fill
these sizes exactly. Source: `_compute_per_buffer_param_layout` in megatron-core 0.19's `optimizer/distrib_optimizer.py`; 0.5 to
0.18 did the same in `distributed/param_and_grad_buffer.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from formats.errors import UserError

ALIGNMENT = 64
"""Parameters start at multiples of this, in elements from the start of their bucket."""


class Parameter(NamedTuple):
    """A parameter of a rank, with its number of elements there."""

    name: str
    size: int


class Slot(NamedTuple):
    """Where a parameter is: its bucket, the offset of its first element in it, and in all buckets one after the other without
    the padding at their ends. The latter is its offset in the tensors of `distrib_optim.pt` and `dp_zero_gather_scatter`."""

    bucket: int
    start: int
    flat: int


def assign_slots(parameters: Sequence[Parameter], buckets: Sequence[int]) -> dict[str, Slot]:
    """Return the slot of each parameter: its bucket, and its offsets in elements.

    `parameters` are in the order of registration, `buckets` the sizes without padding at the end. Raises UserError unless the
    parameters fill all buckets exactly.

    >>> assign_slots([Parameter("embedding", 100), Parameter("norm", 10)], [164])
    {'norm': Slot(bucket=0, start=0, flat=0), 'embedding': Slot(bucket=0, start=64, flat=64)}
    >>> assign_slots([Parameter("embedding", 100), Parameter("norm", 10)], [10, 100])["embedding"]
    Slot(bucket=1, start=0, flat=10)
    """
    starts = [0, *accumulate(buckets)]
    slots = dict[str, Slot]()
    bucket = end = 0
    before = ""
    for name, size in reversed(parameters):
        start = align(end)
        if bucket < len(buckets) and (end == buckets[bucket] or start == buckets[bucket]):
            bucket, start = bucket + 1, 0
        if bucket == len(buckets):
            raise UserError(f"`{name}` has no place in {len(buckets)} buckets of {sum(buckets)} elements")
        if start + size > buckets[bucket]:
            raise UserError(
                (f"`{before}` ends at element {end} of bucket {bucket}, and " if before else "")
                + f"`{name}` would at {start + size}: the bucket has {buckets[bucket]} elements"
            )
        slots[name] = Slot(bucket, start, starts[bucket] + start)
        before, end = name, start + size
    if parameters and (bucket != len(buckets) - 1 or end != buckets[bucket]):
        raise UserError(f"the parameters end at element {end} of bucket {bucket}, the buckets are {list(buckets)}")
    return slots


def bucket_sizes(parameters: Sequence[Parameter], *, limit: int | None, shared: Collection[str] = ()) -> list[int]:
    """Return the sizes of the buckets that megatron-core makes, without padding at their ends.

    `limit` is its `bucket_size` in elements, None for one bucket (without `overlap_grad_reduce`); `shared` are the embeddings
    that are tied over pipeline stages, which get buckets of their own.
    """
    sizes = list[int]()
    end = 0
    for name, size in reversed(parameters):
        start = align(end)
        if name in shared and end:
            sizes.append(start)
            start = 0
        end = start + size
        if name in shared or (limit is not None and end >= limit):
            sizes.append(end)
            end = 0
    return [*sizes, end] if end else sizes


def bounds(sizes: Iterable[int]) -> tuple[int, int]:
    """Return the fewest and the most elements that parameters of these sizes fill, whatever their buckets."""
    known = list(sizes)
    return sum(known), sum(align(size) for size in known)


def align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
