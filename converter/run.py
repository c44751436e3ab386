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
from typing import Any, cast

import numpy as np

from converter.plan import Piece, RowCopy, TensorPlan, pieces
from converter.transform import Move, Transform
from converter.values import cast_into
from formats.arrays import Buffer, as_bytes, offset_of, same_bits
from formats.arrays import copy as copy_bits
from formats.errors import UserError
from formats.in_order import AbandonedError
from formats.spec import Array, Reader, Region, Writer, dtype_name, extent

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
        transform, filled = piece.tensor.transform, list[slice]()
        if transform and transform.moves_values:
            for move in piece.moves(transform):
                self._move(reader, move, transform, out)
                filled.append(cast("slice", move.into[0]))
            filled = filled if transform.to_megatron else [slice(0, len(out))]  # Hugging Face's tensors have no padding
        else:
            for copy, region, rows in piece.copies():
                self._read(reader, copy, region, out[rows], in_order=piece.tensor.reads_in_order)
                filled.append(rows)
        _fill_the_rest(filled, out, piece.tensor.fill)
        return out

    def _read(self, reader: Reader, copy: RowCopy, region: Region, out: Array, *, in_order: bool) -> None:
        same = out.dtype == copy.dtype
        data = out if same else self._scratch.view(out.shape, copy.dtype)
        reader.read(copy.source, region, data)
        if in_order:
            self._told(copy.source, offset_of(region, reader.specs[copy.source].shape) * copy.dtype.itemsize, as_bytes(data))
        if not same:
            cast_into(out, data, name=copy.source)

    def _move(self, reader: Reader, move: Move, transform: Transform, out: Array) -> None:
        data = self._scratch.view(extent(move.region), move.dtype)
        reader.read(move.source, move.region, data)
        if transform.in_order and transform.to_megatron:
            offset = offset_of(move.region, reader.specs[move.source].shape) * move.dtype.itemsize
            self._told(move.source, offset, as_bytes(data))
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


def check_filled(reader: Reader, name: str, value: float) -> None:
    """Raise UserError unless all values of a tensor are what Megatron's has where Hugging Face has no such tensor."""
    if is_filled(reader, name, value):
        return
    if value:
        raise UserError(
            f"`{name}` is not {value:g} everywhere any more, but `config.json` has no place for it",
            hint="models of this family have no such weights: this one cannot be exported as one of them",
        )
    raise UserError(
        f"`{name}` is not zero any more, but `config.json` has no place for it",
        hint="set `attention_bias` and `mlp_bias` to true in the `config.json` given with `--hf-config`",
    )


def check_exact(reader: Reader, plan: TensorPlan) -> None:
    """Raise UserError unless adding a tensor's offset, and taking it off again, gives back every value."""
    assert plan.transform is not None
    (source,), target, offset = plan.parts, plan.spec.dtype, plan.transform.offset
    with np.errstate(all="ignore"):
        for piece in pieces([TensorPlan(source)], limit=PIECE_BYTES // 4):
            data = np.empty(extent(piece.region), source.dtype)
            reader.read(source.name, piece.region, data)
            back = ((data.astype(np.float64) + offset).astype(target).astype(np.float64) - offset).astype(source.dtype)
            if not same_bits(back, data):
                raise UserError(
                    f"`{source.name}` cannot be stored as `{plan.spec.name}` exactly: there {offset:+g} is added to each value, "
                    f"which rounds in {dtype_name(target)}",
                    hint="convert with `--dtype fp32`",
                )


def is_filled(reader: Reader, name: str, value: float, *, start: int = 0) -> bool:
    """Do all rows of a tensor from row `start` on hold one value? Streams them."""
    spec = reader.specs[name]
    for piece in pieces([TensorPlan(spec)], limit=PIECE_BYTES):
        if piece.rows.stop > start:
            data = np.empty(extent(piece.region), spec.dtype)
            reader.read(name, piece.region, data)
            if np.any(data[max(0, start - piece.rows.start) :] != value):
                return False
    return True
