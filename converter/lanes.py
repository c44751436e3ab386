"""Divide a plan into two lanes that are worked on side by side, so that two files are hashed at a time.

A hash takes bytes in order, so one file keeps one core busy. Pure arithmetic on which tensor touches which files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate


def cut(sizes: Sequence[int], touched: Sequence[Iterable[str]]) -> int | None:
    """Return where to cut a list of tensors so that no file is on both sides, as near to half the bytes as possible.

    `sizes` are their bytes, `touched` their files. None if there is no such cut.

    >>> cut([8, 8, 8, 8], [{"a"}, {"a"}, {"b"}, {"b"}])
    2
    """
    last = {file: number for number, files in enumerate(touched) for file in files}
    open_until = accumulate((max((last[file] for file in files), default=0) for files in touched), max)
    cuts = [number + 1 for number, until in enumerate(open_until) if until <= number][:-1]
    ends, half = list(accumulate(sizes)), sum(sizes) / 2
    return min(cuts, key=lambda number: abs(ends[number - 1] - half), default=None)


def alternately[T](one: Iterable[T], other: Iterable[T]) -> Iterator[T]:
    """Yield items of both in turns; once one is at its end, the rest of the other."""
    sources: list[Iterator[T]] = [iter(one), iter(other)]
    while sources:
        for source in list(sources):
            try:
                yield next(source)
            except StopIteration:
                sources.remove(source)


def in_lanes[T](items: Callable[[], Iterable[T]], is_first: Callable[[T], bool]) -> Iterator[T]:
    """Yield the same items, those of the first lane and the others alternately, each lane in its order."""
    return alternately((item for item in items() if is_first(item)), (item for item in items() if not is_first(item)))
