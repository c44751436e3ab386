"""Two lanes through a plan, worked on side by side, so that two files are hashed at a time: a hash takes bytes in order.

Pure arithmetic on which tensor touches which files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate


def cut(sizes: Sequence[int], touched: Sequence[Iterable[str]]) -> int | None:
    """Where to cut a list of things, given each one's bytes and files, so that no file is on both sides: as near to half
    the bytes as can be; None if there is no such place."""
    last = {file: number for number, files in enumerate(touched) for file in files}
    open_until = accumulate((max((last[file] for file in files), default=0) for files in touched), max)
    places = [number + 1 for number, until in enumerate(open_until) if until <= number][:-1]
    ends, half = list(accumulate(sizes)), sum(sizes) / 2
    return min(places, key=lambda place: abs(ends[place - 1] - half), default=None)


def alternately[T](one: Iterable[T], other: Iterable[T]) -> Iterator[T]:
    """Items of both, in turns as long as there are any of both."""
    sources: list[Iterator[T]] = [iter(one), iter(other)]
    while sources:
        for source in list(sources):
            try:
                yield next(source)
            except StopIteration:
                sources.remove(source)


def in_lanes[T](items: Callable[[], Iterable[T]], is_first: Callable[[T], bool]) -> Iterator[T]:
    """The same items, those of the first lane and the others alternately, each lane in its order."""
    return alternately((item for item in items() if is_first(item)), (item for item in items() if not is_first(item)))
