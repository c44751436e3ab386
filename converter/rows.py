"""Where each row of a Megatron tensor comes from, as one table read in both directions.

A fused Megatron tensor is the rows of several Hugging Face tensors, its parts, in another order. Each function here writes one
order down as ranges of rows; merging, splitting, tensor-parallel shards and streaming all follow from it. Knows numbers of rows
and no names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from converter.model import Model


@dataclass(frozen=True, slots=True)
class RowRange:
    """`rows` rows: from row `src_row` of a part to row `dst_row` of the tensor that is made."""

    part: int
    src_row: int
    dst_row: int
    rows: int
    step: int = 1
    """On Hugging Face's side, every `step`-th row; on Megatron's, rows are consecutive."""


RowOrder = Callable[[tuple[int, ...], Model], Iterator[RowRange]]
"""From the parts' numbers of rows to the ranges that cover the Megatron tensor, from its first row to its last."""


def concatenated(parts: tuple[int, ...], _model: Model) -> Iterator[RowRange]:
    """Yield part after part: one part as it is, or the gate and then the up projection."""
    dst_row = 0
    for part, rows in enumerate(parts):
        yield RowRange(part, 0, dst_row, rows)
        dst_row += rows


def interleaved_by_group(parts: tuple[int, ...], model: Model) -> Iterator[RowRange]:
    """Yield, query group by query group, its rows of every part: queries, key, value. For weights and biases alike.

    Source: `SelfAttention.get_query_key_value_tensors` in megatron-core's `transformer/attention.py`.
    """
    dst_row = 0
    for group in range(model.groups):
        for part, count in enumerate(parts):
            rows = count // model.groups
            yield RowRange(part, group * rows, dst_row, rows)
            dst_row += rows


def gated_by_group(_parts: tuple[int, ...], model: Model) -> Iterator[RowRange]:
    """Yield, query group by query group, its queries, their gates, key and value, where the first part holds query and gate head
    by head.

    Source: `SelfAttention.get_query_key_value_tensors` with `output_gate`; `q_proj` of Qwen3-Next in transformers.
    """
    size, heads, dst_row = model.head_dim, model.heads // model.groups, 0
    for group in range(model.groups):
        for gate in (0, 1):
            for head in range(group * heads, (group + 1) * heads):
                yield RowRange(0, (2 * head + gate) * size, dst_row, size)
                dst_row += size
        for part in (1, 2):
            yield RowRange(part, group * size, dst_row, size)
            dst_row += size


def alternating(parts: tuple[int, ...], _model: Model) -> Iterator[RowRange]:
    """Yield the even rows of a part and then its odd ones: gate and up projection of GPT-OSS, whose rows alternate."""
    half = parts[0] // 2
    yield RowRange(0, 0, 0, half, 2)
    yield RowRange(0, 1, half, half, 2)


def section(number: int) -> RowOrder:
    """Return the order of a tensor that is one of the parts alone: a section of a Hugging Face tensor that holds them all."""

    def order(parts: tuple[int, ...], _model: Model) -> Iterator[RowRange]:
        yield RowRange(number, 0, 0, parts[number])

    return order


def share(number: int, groups: str) -> RowOrder:
    """Return the order of a section whose Hugging Face tensor goes group by group: in each, a share of every section.

    `groups` is the name of the number of groups in the model. Rows are counted from the first part's on.
    """

    def order(parts: tuple[int, ...], model: Model) -> Iterator[RowRange]:
        count = model.size(groups)
        shares = [rows // count for rows in parts]
        for group in range(count):
            src_row = group * sum(shares) + sum(shares[:number])
            yield RowRange(0, src_row, group * shares[number], shares[number])

    return order


def widest(ranges: Iterable[RowRange]) -> int:
    """Return the largest step of the ranges; 1 of none."""
    return max((row_range.step for row_range in ranges), default=1)


def covered(ranges: Iterable[RowRange], total: int) -> bool:
    """Do the ranges cover rows 0 to `total` of the tensor that is made once each, in order?

    Rows after the last range are padding and stay zero.
    """
    end = 0
    for row_range in ranges:
        if row_range.dst_row != end:
            return False
        end += row_range.rows
    return end <= total


def exhausted(ranges: Iterable[RowRange], total: int) -> bool:
    """Do the ranges, of one part and in any order, take each of its rows 0 to `total` once?"""
    end = 0
    for first, last in sorted(_blocks(ranges)):
        if first != end:
            return False
        end = last
    return end == total


def _blocks(ranges: Iterable[RowRange]) -> Iterator[tuple[int, int]]:
    """Yield first row and end of what ranges take together. Those with a step fill a block if there is one for each row of it; a
    block that they do not fill is yielded as overlapping itself."""
    stepped: dict[tuple[int, int, int], list[int]] = {}
    for row_range in ranges:
        if row_range.step == 1:
            yield row_range.src_row, row_range.src_row + row_range.rows
        else:
            first = row_range.src_row - row_range.src_row % row_range.step
            stepped.setdefault((first, row_range.step, row_range.rows), []).append(row_range.src_row)
    for (first, step, rows), starts in stepped.items():
        whole = sorted(starts) == list(range(first, first + step))
        yield first, first + rows * step if whole else first - 1


def follow_one_another(ranges: Iterable[RowRange]) -> bool:
    """Do the ranges, in this order, take a part's rows from its first to its last?"""
    end = 0
    for row_range in ranges:
        if row_range.src_row != end or row_range.step != 1:
            return False
        end += row_range.rows
    return True
