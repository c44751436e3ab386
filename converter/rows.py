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
class Run:
    """`count` consecutive rows: from row `there` of a part to row `here` of the Megatron tensor."""

    part: int
    there: int
    here: int
    count: int


Order = Callable[[tuple[int, ...], Model], Iterator[Run]]
"""From the parts' numbers of rows to the runs that cover the Megatron tensor, from its first row to its last."""


def same(parts: tuple[int, ...], _model: Model) -> Iterator[Run]:
    """Part after part: one part as it is, or the gate and then the up projection."""
    here = 0
    for part, count in enumerate(parts):
        yield Run(part, 0, here, count)
        here += count


def grouped(parts: tuple[int, ...], model: Model) -> Iterator[Run]:
    """Query group by query group: its queries, its key, its value. For weights and biases alike.

    Source: `SelfAttention.get_query_key_value_tensors` in megatron-core's `transformer/attention.py`.
    """
    here = 0
    for group in range(model.groups):
        for part, rows in enumerate(parts):
            count = rows // model.groups
            yield Run(part, group * count, here, count)
            here += count


def covered(runs: Iterator[Run], total: int) -> bool:
    """Do the runs cover rows 0 to `total` once each, in order? Rows after the last run are padding and stay zero."""
    end = 0
    for run in runs:
        if run.here != end:
            return False
        end += run.count
    return end <= total
