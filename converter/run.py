"""Carry out pieces on a few threads: read rows, put them in their order, write them. Buffers are reused.

Pieces are independent and every offset is known, so any thread may do any piece, and the bytes written do not depend on the
number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

from converter.plan import Piece, RowCopy
from converter.transform import Move, Transform
from converter.values import cast_into
from formats.arrays import Buffer, as_bytes, offset_of
from formats.arrays import copy as copy_bits
from formats.in_order import AbandonedError
from formats.outputs import Outputs, Writer, alongside
from formats.spec import Array, Reader, Region, extent

PIECE_BYTES = 4 << 20
"""Larger pieces did not get faster here; smaller ones cost system calls (docs/decisions.md)."""


class Task(NamedTuple):
    """A piece and its number among all pieces of the plan.

    One that is `written` already is read and observed, and not written again.
    """

    number: int
    piece: Piece
    written: bool = False


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Observer:
    """Callbacks of a run. All but `stop` and `made` run on its worker threads."""

    read: Callable[[str, int, memoryview], None] = _nothing
    """Rows were read: the source's tensor, the offset in it in bytes, the bytes."""

    made: Callable[[Piece, Array], None] | None = None
    """A piece was put together, in the output's dtype. Runs on a thread of its own, while the piece is written."""

    done: Callable[[Task], None] = _nothing
    """A task is complete: its piece is written."""

    stop: Callable[[], None] = _nothing
    """A task failed, and no further ones will start: threads that wait for one another must be woken."""


def run(tasks: Iterable[Task], reader: Reader, writer: Writer, *, outputs: Outputs, workers: int, observer: Observer) -> None:
    """Execute every task: read its piece with `reader` and put it into `outputs` where `writer` lays it out."""

    def start() -> Callable[[Task], None]:
        buffers = PieceBuffers(observer.read)

        def execute(task: Task) -> None:
            name, region = task.piece.tensor.spec.name, task.piece.region
            data = buffers.make(task.piece, reader, writer.file_offset(name, region))
            with alongside(pool, observer.made, task.piece, data):
                if not task.written:
                    writer.write(outputs, name, region, data)
            observer.done(task)

        return execute

    with ThreadPoolExecutor(workers, thread_name_prefix="made") as pool:
        in_threads(tasks, start, workers=workers, stop=observer.stop)


def in_threads[T](
    items: Iterable[T], start: Callable[[], Callable[[T], None]], *, workers: int, stop: Callable[[], None] = _nothing
) -> None:
    """Draw items in order and call, on some thread, the function that `start` returned for that thread.

    Uses at most `workers` threads, and no more than there are items. The first error stops all threads and is raised.
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
            if isinstance(error, Exception):  # no thread does the item that was drawn
                stop()
            raise
    errors = [error for task in tasks if (error := task.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, AbandonedError)):
        raise error


class PieceBuffers:
    """One thread's buffers, in which pieces are put together. `read` is called with the rows that were read."""

    def __init__(self, read: Callable[[str, int, memoryview], None] = _nothing) -> None:
        self._target, self._scratch = Buffer(), Buffer()
        self._observe = read

    def make(self, piece: Piece, reader: Reader, offset: int = 0) -> Array:
        """Return a piece's data, valid until the next call, at an address with the same remainder by page as `offset`.

        The array has the shape of the piece's region and the dtype of its tensor; rows that no copy fills hold its `fill`.
        """
        out = self._target.view(extent(piece.region), piece.tensor.spec.dtype, offset=offset)
        self.fill(piece, reader, out)
        return out

    def fill(self, piece: Piece, reader: Reader, out: Array) -> None:
        """Write a piece's data into `out`, which has the shape of its region and the dtype of its tensor."""
        transform = piece.tensor.transform
        filled: list[slice] = []
        if transform and transform.moves_values:
            for move in piece.moves(transform):
                self._move(reader, move, transform, out)
                filled.append(cast("slice", move.into[0]))
            filled = filled if transform.to_megatron else [slice(0, len(out))]  # Hugging Face's tensors have no padding
        else:
            for copy, region, rows in piece.copies():
                self._read(reader, copy, region, out[rows], in_order=piece.tensor.reads_in_order)
                filled += [rows] if isinstance(rows, slice) else []
        if piece.region:
            _fill_the_rest(filled, out, piece.tensor.fill)

    def _read(self, reader: Reader, copy: RowCopy, region: Region, out: Array, *, in_order: bool) -> None:
        same_dtype = out.dtype == copy.dtype
        data = out if same_dtype else self._scratch.view(out.shape, copy.dtype)
        reader.read(copy.source, region, data)
        if in_order:
            self._observe(copy.source, offset_of(region, reader.specs[copy.source].shape) * copy.dtype.itemsize, as_bytes(data))
        if not same_dtype:
            cast_into(out, data, name=copy.source)

    def _move(self, reader: Reader, move: Move, transform: Transform, out: Array) -> None:
        data = self._scratch.view(extent(move.region), move.dtype)
        reader.read(move.source, move.region, data)
        if transform.in_order and transform.to_megatron:
            offset = offset_of(move.region, reader.specs[move.source].shape) * move.dtype.itemsize
            self._observe(move.source, offset, as_bytes(data))
        values, target = (data, out[move.into]) if transform.to_megatron else (out[move.into], data)
        view = transform.view(values)[move.rows]
        source, target = (view, target) if transform.to_megatron else (target, view)
        shifted = transform.shifted(source)
        if shifted.dtype == target.dtype:
            copy_bits(target, shifted)
        else:
            cast_into(target, shifted, name=move.source)


def _fill_the_rest(filled: list[slice], out: Array, value: float) -> None:
    """Set the rows that nothing has filled."""
    end = 0
    for rows in sorted(filled, key=lambda rows: rows.start):
        if rows.start > end:
            out[end : rows.start] = value
        end = rows.stop
    if end < len(out):
        out[end:] = value


class _Shared[T]:
    """An iterator that several threads draw from, until one of them stops it."""

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
