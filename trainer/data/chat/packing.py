"""From the lengths of examples to rows of them. Knows numbers alone: lengths, a seed and an epoch decide it all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Rows:
    """Examples in rows: row `i` is `examples[starts[i] : starts[i + 1]]`."""

    examples: np.ndarray
    """Numbers of examples, each once."""

    starts: np.ndarray
    """int64 `[rows + 1]`."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.examples[self.starts[row] : self.starts[row + 1]]

    def permuted(self, order: np.ndarray) -> Rows:
        """The same rows, `order[0]` first."""
        counts = np.diff(self.starts)[order]
        starts = np.concatenate(([0], np.cumsum(counts)))
        moved = np.repeat(self.starts[:-1][order] - starts[:-1], counts) + np.arange(starts[-1])
        return Rows(self.examples[moved], starts)


def draw(seed: int, epoch: int) -> np.random.Generator:
    """The random numbers that order one epoch."""
    return np.random.default_rng((seed, epoch))


def singly(count: int) -> Rows:
    """Each example in a row of its own, in their order."""
    return Rows(np.arange(count), np.arange(count + 1))


def filled(lengths: np.ndarray, *, capacity: int) -> Rows:
    """Rows of up to `capacity` tokens, as full as best fit makes them that takes long examples first."""
    return _best_fit(lengths, np.argsort(-lengths, kind="stable"), capacity)


def shuffled(lengths: np.ndarray, *, capacity: int, seed: int, epoch: int) -> Rows:
    """Rows of an epoch: best fit takes examples in random order, so that any may come to lie together, and rows are shuffled.

    On lengths as conversations have them, rows are hardly less full than the fullest: 99.6 % instead of 99.9 %.
    """
    drawn = draw(seed, epoch)
    rows = _best_fit(lengths, drawn.permutation(len(lengths)), capacity)
    return rows.permuted(drawn.permutation(len(rows)))


def in_order(lengths: np.ndarray, *, capacity: int) -> Rows:
    """Rows that are the same in every epoch."""
    return _best_fit(lengths, np.arange(len(lengths)), capacity)


def _best_fit(lengths: np.ndarray, order: np.ndarray, capacity: int) -> Rows:
    """Each example in turn goes to the fullest row that has room for it. `lengths` are from 1 to `capacity`.

    One look at the free room per example, whatever the number of rows: a million take seconds.
    """
    row_of, count = np.empty(len(lengths), np.int64), 0
    rooms: dict[int, list[int]] = {}
    free = 0  # bit n is set where a row has room for n tokens: the best fit is the lowest bit from the length on
    for example, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rooms[room].pop()
            if not rooms[room]:
                free ^= 1 << room
        else:
            row, room, count = count, capacity, count + 1
        row_of[example] = row
        if room > length:
            rooms.setdefault(room - length, []).append(row)
            free |= 1 << (room - length)
    return _by_row(row_of, count)


def _by_row(row_of: np.ndarray, count: int) -> Rows:
    starts = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=count))))
    return Rows(np.argsort(row_of, kind="stable"), starts)


def padded(lengths: np.ndarray, *, multiple: int) -> np.ndarray:
    """Lengths brought up to a multiple."""
    return -(-lengths // multiple) * multiple


def efficiency(lengths: np.ndarray, rows: int, *, capacity: int) -> float:
    """The share of the rows that is tokens of examples."""
    return float(lengths.sum(dtype=np.int64)) / (rows * capacity)
