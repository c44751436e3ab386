"""Outputs that are uploaded while they are written. Parts are sent in order: an early array blocks until its offset is next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from formats.arrays import as_bytes
from formats.in_order import InOrder
from formats.outputs import Tap
from formats.remote.upload import FileUpload, Upload
from formats.spec import Array, Span

Spans = Callable[[str], Iterable[Span]]


class RemoteOutputs:
    """Files below a URL. Opened before the first write, with what is known of the files that hold arrays."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.tap: Tap | None = None
        self._begun: dict[str, FileUpload] = {}
        self._sizes: Mapping[str, int] = {}

    def open(self, upload: Upload, sizes: Mapping[str, int], spans: Spans) -> None:
        """From now on everything goes to `upload`; files of `sizes` bytes hold arrays, and `spans` says where."""
        self._upload, self._sizes = upload, sizes
        self._arrays = InOrder(spans, lambda file: upload.open(file, sizes[file]), lambda _, sink: sink.close())

    def write(self, file: str, offset: int, data: Array) -> None:
        """Upload an array once everything before it in the file was uploaded; blocks until then."""
        whole = as_bytes(np.ascontiguousarray(data))
        self._arrays.put(file, offset, whole)
        if self.tap:
            self.tap(file, offset, whole)

    def begin(self, file: str, size: int) -> None:
        self._begun[file] = self._upload.open(file, size)

    def put(self, file: str, offset: int, data: bytes | memoryview) -> None:  # noqa: ARG002 - it is the next, by `begin`
        """Of a file that holds arrays, what is known has passed with them."""
        if file not in self._sizes:
            self._begun[file].update(memoryview(data))

    def abandon(self) -> None:
        """Wake whoever waits for a turn that will not come."""
        self._arrays.abandon()

    def sync(self) -> None:
        pass

    def check(self) -> None:
        """Nobody goes on with an upload."""

    def close(self) -> None:
        for sink in self._begun.values():
            sink.close()
        self._begun.clear()
