"""Carry out pieces: read, place, write, on a few threads with buffers that are used again.

Pieces are independent and every offset is known, so any thread may do any piece and the bytes written do not depend on how
many there are. Knows nothing of models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from converter.plan import Copy, Making, Piece, pieces
from converter.values import cast_into
from formats.disk import Buffer
from formats.errors import UserError
from formats.spec import Array, Reader, Region, Writer, extent

PIECE_BYTES = 4 << 20
"""Larger pieces did not get faster here; smaller ones cost system calls (docs/decisions.md)."""

Progress = Callable[[int], None]
"""Called with the bytes of each finished piece."""


DEFAULT_WORKERS = 4
"""Threads mostly wait for the disk: two fill a quiet one, four also one with delays, eight gave no more."""


def run(makings: Iterable[Making], reader: Reader, writer: Writer, *, workers: int, progress: Progress) -> None:
    """Make every tensor. The first error of any thread stops all and is raised."""
    queue = _Shared(pieces(makings, limit=PIECE_BYTES))

    def work() -> None:
        bench = Bench()
        try:
            for piece in queue:
                name = piece.making.spec.name
                writer.write(name, piece.region, bench.make(piece, reader, writer.place(name, piece.region)))
                progress(piece.nbytes)
        except BaseException:
            queue.stop()
            raise

    with ThreadPoolExecutor(workers, thread_name_prefix="piece") as pool:
        tasks = [pool.submit(work) for _ in range(workers)]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            queue.stop()
            raise


class Bench:
    """One thread's buffers: where a piece is put together."""

    def __init__(self) -> None:
        self._target, self._scratch = Buffer(), Buffer()

    def make(self, piece: Piece, reader: Reader, place: int) -> Array:
        """The piece's data, valid until the next call; its address has the remainder by page that `place` has."""
        out = self._target.view(extent(piece.region), piece.making.spec.dtype, place=place)
        filled = 0
        for copy, region, rows in piece.copies():
            self._read(reader, copy, region, out[rows])
            filled += rows.stop - rows.start
        if filled < len(out):
            _zero_the_rest(piece, out)
        return out

    def _read(self, reader: Reader, copy: Copy, region: Region, out: Array) -> None:
        if out.dtype == copy.dtype:
            reader.read(copy.source, region, out)
            return
        data = self._scratch.view(out.shape, copy.dtype)
        reader.read(copy.source, region, data)
        cast_into(out, data)


def _zero_the_rest(piece: Piece, out: Array) -> None:
    end = 0
    for _, _, rows in sorted(piece.copies(), key=lambda copy: copy[2].start):
        out[end : rows.start] = 0
        end = rows.stop
    out[end:] = 0


class _Shared:
    """An iterator that several threads draw from, until someone stops it."""

    def __init__(self, items: Iterator[Piece]) -> None:
        self._items = items
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def __iter__(self) -> Iterator[Piece]:
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
    for piece in pieces([Making(spec, ())], limit=PIECE_BYTES) if same else ():
        one, two = (np.empty(extent(piece.region), spec.dtype) for _ in range(2))
        reader.read(name, piece.region, one)
        reader.read(other, piece.region, two)
        if not np.array_equal(one.view(np.uint8), two.view(np.uint8)):
            same = False
            break
    if not same:
        raise UserError(
            f"`{name}` differs from `{other}`, though `config.json` ties them",
            hint="set `tie_word_embeddings` to false in `config.json` to keep both",
        )


def check_zero(reader: Reader, name: str) -> None:
    """Raise UserError unless a tensor is all zeros."""
    spec = reader.specs[name]
    for piece in pieces([Making(spec, ())], limit=PIECE_BYTES):
        data = np.empty(extent(piece.region), spec.dtype)
        reader.read(name, piece.region, data)
        if np.any(data):
            raise UserError(
                f"`{name}` is not zero any more, but `config.json` has no place for it",
                hint="set `attention_bias` and `mlp_bias` to true in the `config.json` given with `--hf-config`",
            )
