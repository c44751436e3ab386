"""Hash tensors and files as their bytes pass, so that nothing is read a second time for it.

A hash takes bytes in order: a thread that arrives early blocks until its offset is next (formats/in_order.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

from blake3 import blake3

from converter.conversion_plan import ConversionPlan
from converter.journal import Finished, Journal
from converter.plan import Piece, TensorPlan
from converter.run import Observer
from formats.arrays import as_bytes, offset_of
from formats.in_order import InOrder
from formats.integrity import Hash
from formats.outputs import Tap
from formats.spec import Array, Span


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
        passing = tensor_plan.sources.keys() if provenance.passing == "read" else {tensor_plan.spec.name}
        return not self._known.keys() >= passing

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

    def _tensor_passed(self, name: str, digest: blake3) -> None:
        self.tensors[name] = digest.hexdigest()
        if self._journal:
            self._journal.tensor(name, self.tensors[name])

    def _file_passed(self, name: str, digest: Hash) -> None:
        self.files[name] = digest.hexdigest()
        if self._journal:
            self._journal.file(name, self.files[name])
