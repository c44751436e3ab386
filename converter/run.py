"""Carry out pieces: read, place, write, on a few threads with buffers that are used again.

Pieces are independent and every offset is known, so any thread may do any piece and the bytes written do not depend on how
many there are. Knows nothing of models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from converter.plan import Piece, RowCopy, TensorPlan, pieces
from converter.values import cast_into
from formats.arrays import Buffer, as_bytes, offset_of, same_bits
from formats.errors import UserError
from formats.in_order import AbandonedError
from formats.spec import Array, Reader, Region, Writer, extent

PIECE_BYTES = 4 << 20
"""Larger pieces did not get faster here; smaller ones cost system calls (docs/decisions.md)."""


@dataclass(frozen=True, slots=True)
class Task:
    """A piece and its number among all pieces of the plan. One that is `written` is put together only to be looked at."""

    number: int
    piece: Piece
    written: bool = False


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Observer:
    """What looks on: told of rows as they were read (the source's tensor, offset in it, bytes), of a piece put together,
    and of a task done; `stop` is called when there will be no more."""

    read: Callable[[str, int, memoryview], None] = _nothing
    made: Callable[[Piece, Array], None] = _nothing
    done: Callable[[Task], None] = _nothing
    stop: Callable[[], None] = _nothing


def run(tasks: Iterable[Task], reader: Reader, writer: Writer, *, workers: int, watch: Observer) -> None:
    """Carry out every task."""

    def carry_out() -> Callable[[Task], None]:
        bench = PieceBuffers(watch.read)

        def one(task: Task) -> None:
            name, region = task.piece.tensor.spec.name, task.piece.region
            data = bench.make(task.piece, reader, writer.file_offset(name, region))
            watch.made(task.piece, data)
            if not task.written:
                writer.write(name, region, data)
            watch.done(task)

        return one

    in_threads(tasks, carry_out, workers=workers, stop=watch.stop)


def in_threads[T](
    items: Iterable[T], start: Callable[[], Callable[[T], None]], *, workers: int, stop: Callable[[], None] = _nothing
) -> None:
    """Draw items in order and do each on some thread, with what `start` prepared for that thread.

    At most `workers` threads, and no more than there are items. The first error stops all and is raised.
    """
    queue = _Shared(iter(items))

    def work(first: T) -> None:
        try:
            act = start()
            act(first)
            for item in queue:
                act(item)
        except BaseException:
            queue.stop()
            stop()
            raise

    with ThreadPoolExecutor(workers, thread_name_prefix="piece") as pool:
        try:
            tasks = [pool.submit(work, first) for first in islice(queue, workers)]
            wait(tasks, return_when=FIRST_EXCEPTION)
        except BaseException as error:
            queue.stop()
            if isinstance(error, Exception):  # the item that was drawn is done by nobody
                stop()
            raise
    errors = [error for task in tasks if (error := task.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, AbandonedError)):
        raise error


class PieceBuffers:
    """One thread's buffers: where a piece is put together. `read` is told of rows as they come from the source."""

    def __init__(self, read: Callable[[str, int, memoryview], None] = _nothing) -> None:
        self._target, self._scratch = Buffer(), Buffer()
        self._told = read

    def make(self, piece: Piece, reader: Reader, place: int = 0) -> Array:
        """The piece's data, valid until the next call; its address has the remainder by page that `place` has."""
        out = self._target.view(extent(piece.region), piece.tensor.spec.dtype, offset=place)
        filled = 0
        for copy, region, rows in piece.copies():
            self._read(reader, copy, region, out[rows])
            filled += rows.stop - rows.start
        if filled < len(out):
            _zero_the_rest(piece, out)
        return out

    def _read(self, reader: Reader, copy: RowCopy, region: Region, out: Array) -> None:
        same = out.dtype == copy.dtype
        data = out if same else self._scratch.view(out.shape, copy.dtype)
        reader.read(copy.source, region, data)
        self._told(copy.source, offset_of(region, reader.specs[copy.source].shape) * copy.dtype.itemsize, as_bytes(data))
        if not same:
            cast_into(out, data, name=copy.source)


def _zero_the_rest(piece: Piece, out: Array) -> None:
    end = 0
    for _, _, rows in sorted(piece.copies(), key=lambda copy: copy[2].start):
        out[end : rows.start] = 0
        end = rows.stop
    out[end:] = 0


class _Shared[T]:
    """An iterator that several threads draw from, until someone stops it."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def __iter__(self) -> Iterator[T]:
        while not self._stopped:
            with self._lock:
                item = next(self._items, None)
            if item is None:
                return
            yield item


def check_equal(reader: Reader, name: str, other: str) -> None:
    """Raise UserError unless two tensors hold the same bytes. Streams both."""
    spec, like = reader.specs[name], reader.specs[other]
    same = spec.shape == like.shape and spec.dtype == like.dtype
    for piece in pieces([TensorPlan(spec)], limit=PIECE_BYTES) if same else ():
        one, two = (np.empty(extent(piece.region), spec.dtype) for _ in range(2))
        reader.read(name, piece.region, one)
        reader.read(other, piece.region, two)
        if not same_bits(one, two):
            same = False
            break
    if not same:
        raise UserError(
            f"`{name}` differs from `{other}`, though `config.json` ties them",
            hint="set `tie_word_embeddings` to false in `config.json` to keep both",
        )


def check_zero(reader: Reader, name: str) -> None:
    """Raise UserError unless a tensor is all zeros."""
    if not is_zero(reader, name):
        raise UserError(
            f"`{name}` is not zero any more, but `config.json` has no place for it",
            hint="set `attention_bias` and `mlp_bias` to true in the `config.json` given with `--hf-config`",
        )


def is_zero(reader: Reader, name: str, *, start: int = 0) -> bool:
    """Are all rows of a tensor zero from row `start` on? Streams them."""
    spec = reader.specs[name]
    for piece in pieces([TensorPlan(spec)], limit=PIECE_BYTES):
        if piece.rows.stop > start:
            data = np.empty(extent(piece.region), spec.dtype)
            reader.read(name, piece.region, data)
            if np.any(data[max(0, start - piece.rows.start) :]):
                return False
    return True
