"""Where each row of a Megatron tensor comes from, as one table read in both directions.

A fused Megatron tensor is the rows of several Hugging Face tensors, its parts, in another order. Each function here
writes one order down as runs of consecutive rows; merging, splitting, cutting for tensor parallelism and streaming all
follow from it. Knows numbers of rows and no names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from converter.model import Model


@dataclass(frozen=True, slots=True)
class RowRange:
    """`count` consecutive rows: from row `there` of a part to row `here` of the Megatron tensor."""

    part: int
    src_row: int
    dst_row: int
    rows: int


RowOrder = Callable[[tuple[int, ...], Model], Iterator[RowRange]]
"""From the parts' numbers of rows to the runs that cover the Megatron tensor, from its first row to its last."""


def concatenated(parts: tuple[int, ...], _model: Model) -> Iterator[RowRange]:
    """Part after part: one part as it is, or the gate and then the up projection."""
    here = 0
    for part, count in enumerate(parts):
        yield RowRange(part, 0, here, count)
        here += count


def interleaved_by_group(parts: tuple[int, ...], model: Model) -> Iterator[RowRange]:
    """Query group by query group: its queries, its key, its value. For weights and biases alike.

    Source: `SelfAttention.get_query_key_value_tensors` in megatron-core's `transformer/attention.py`.
    """
    here = 0
    for group in range(model.groups):
        for part, rows in enumerate(parts):
            count = rows // model.groups
            yield RowRange(part, group * count, here, count)
            here += count


def covered(runs: Iterator[RowRange], total: int) -> bool:
    """Do the runs cover rows 0 to `total` once each, in order? Rows after the last run are padding and stay zero."""
    end = 0
    for run in runs:
        if run.dst_row != end:
            return False
        end += run.rows
    return end <= total
