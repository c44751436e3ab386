"""Hash tensors and files as their bytes pass, so that nothing is read a second time for it.

A hash takes bytes in order: a thread that arrives early blocks until its offset is next (formats/in_order.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from blake3 import blake3

from converter.conversion_plan import ConversionPlan
from converter.journal import Finished, Journal
from converter.plan import Piece, TensorPlan, pieces
from converter.run import PIECE_BYTES, Observer, in_threads
from formats.arrays import as_bytes, offset_of
from formats.in_order import InOrder
from formats.integrity import Hash
from formats.outputs import Tap
from formats.spec import Array, Reader, Span, extent


class Hashing:
    """The hashes of a plan's tensors (BLAKE3) and files (sha256), by name, as far as they are known.

    `finished` are those that an earlier run took; these tensors are not hashed again. Each new hash is appended to `journal`.
    """

    def __init__(self, plan: ConversionPlan, finished: Finished, journal: Journal | None = None) -> None:
        self.tensors, self.files = dict(finished.tensors), dict(finished.files)
        self._plan, self._known, self._journal = plan, finished.tensors, journal
        self._tensor_streams = InOrder(self._tensor_span, lambda _: blake3(), self._tensor_passed)
        self._file_streams = InOrder(plan.writer.spans, lambda _: hashlib.sha256(), self._file_passed)

    def observing(self, observer: Observer) -> Observer:
        """Return `observer` with the callbacks that hash tensors, as they are read or as they are made; the same if the plan
        hashes none."""
        provenance = self._plan.provenance
        if not provenance.hashed:
            return observer
        return replace(observer, read=self._read) if provenance.passing == "read" else replace(observer, made=self._made)

    def tap(self, files: Iterable[str]) -> Tap | None:
        """Return the callback of outputs that hashes `files`, of which every byte will pass; None if the plan hashes none."""
        if not self._plan.output.integrity:
            return None
        live = frozenset(files)
        return lambda file, offset, data: self._file_streams.put(file, offset, data) if file in live else None

    def lacks(self, tensor_plan: TensorPlan) -> bool:
        """Return whether a tensor whose bytes pass with this one had no hash when the run began."""
        provenance = self._plan.provenance
        if not provenance.hashed:
            return False
        if provenance.passing == "read":
            return tensor_plan.reads_in_order and not self._known.keys() >= tensor_plan.sources.keys()
        return tensor_plan.spec.name not in self._known

    def out_of_order(self) -> list[str]:
        """Return the source's tensors whose bytes do not pass in order, so that `read_again` has to hash them."""
        provenance = self._plan.provenance
        if not provenance.hashed or provenance.passing != "read":
            return []
        return sorted({name for plan in self._plan.tensor_plans if not plan.reads_in_order for name in plan.sources})

    def read_again(self, reader: Reader, names: Iterable[str], *, workers: int) -> None:
        """Hash these tensors of the source, each from its first byte to its last on one of `workers` threads."""
        left = [name for name in names if name not in self._known]
        in_threads(left, lambda: partial(self._read_whole, reader), workers=workers)

    def unknown(self, files: Iterable[str]) -> list[str]:
        """Return the files of the output that `integrity.json` lists and that were not hashed as they passed."""
        if not self._plan.output.integrity:
            return []
        return [name for name in self._plan.output.listed(files) if name not in self.files]

    def abandon(self) -> None:
        """Wake the threads that wait for bytes of other threads, which have failed."""
        self._tensor_streams.abandon()
        self._file_streams.abandon()

    def _tensor_span(self, name: str) -> Iterator[Span]:
        yield Span(0, None, self._plan.provenance.tensors[name].nbytes)

    def _read(self, name: str, offset: int, data: memoryview) -> None:
        if name not in self._known:
            self._tensor_streams.put(name, offset, data)

    def _made(self, piece: Piece, data: Array) -> None:
        spec = piece.tensor.spec
        self._read(spec.name, offset_of(piece.region, spec.shape) * spec.dtype.itemsize, as_bytes(data))

    def _read_whole(self, reader: Reader, name: str) -> None:
        spec, digest = self._plan.provenance.tensors[name], blake3()
        for piece in pieces([TensorPlan(spec)], limit=PIECE_BYTES):
            data = np.empty(extent(piece.region), spec.dtype)
            reader.read(name, piece.region, data)
            digest.update(as_bytes(data))
        self._tensor_passed(name, digest)

    def _tensor_passed(self, name: str, digest: blake3) -> None:
        self.tensors[name] = digest.hexdigest()
        if self._journal:
            self._journal.tensor(name, self.tensors[name])

    def _file_passed(self, name: str, digest: Hash) -> None:
        self.files[name] = digest.hexdigest()
        if self._journal:
            self._journal.file(name, self.files[name])
