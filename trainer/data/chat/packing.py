"""From the lengths of examples to rows of them. Knows numbers alone: lengths, a seed and an epoch decide it all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WINDOW = 2**14
"""Examples that are looked at together while a run packs: enough to fill rows well, few enough that the order stays random."""


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
    """Rows of up to `capacity` tokens, as full as best fit makes them that takes long examples first.

    Sorting and one look at the free room per example: a million take seconds. `lengths` are from 1 to `capacity`.
    """
    row_of, count = np.empty(len(lengths), np.int64), 0
    rooms: dict[int, list[int]] = {}
    free = 0  # bit n is set where a row has room for n tokens: the best fit is the lowest bit from the length on
    order = np.argsort(-lengths, kind="stable")
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


def shuffled(lengths: np.ndarray, *, capacity: int, seed: int, epoch: int, window: int = WINDOW) -> Rows:
    """Rows of an epoch: examples in random order are packed `window` at a time, and each window's rows shuffled."""
    drawn = draw(seed, epoch)
    return _in_windows(lengths, drawn.permutation(len(lengths)), capacity=capacity, window=window, drawn=drawn)


def in_order(lengths: np.ndarray, *, capacity: int, window: int = WINDOW) -> Rows:
    """Rows that are the same in every epoch."""
    return _in_windows(lengths, np.arange(len(lengths)), capacity=capacity, window=window, drawn=None)


def _in_windows(lengths: np.ndarray, order: np.ndarray, *, capacity: int, window: int, drawn: np.random.Generator | None) -> Rows:
    examples, counts = [], []
    for first in range(0, len(order), window):
        part = order[first : first + window]
        rows = filled(lengths[part], capacity=capacity)
        if drawn is not None:
            rows = rows.permuted(drawn.permutation(len(rows)))
        examples.append(part[rows.examples])
        counts.append(np.diff(rows.starts))
    return Rows(np.concatenate(examples), np.concatenate(([0], np.cumsum(np.concatenate(counts)))))


def padded(lengths: np.ndarray, *, multiple: int) -> np.ndarray:
    """Lengths brought up to a multiple."""
    return -(-lengths // multiple) * multiple


def efficiency(lengths: np.ndarray, rows: int, *, capacity: int) -> float:
    """The share of the rows that is tokens of examples."""
    return float(lengths.sum(dtype=np.int64)) / (rows * capacity)
