"""Outputs that are uploaded while they are written. Parts are sent in order: an early array blocks until its offset is next."""

from __future__ import annotations

import numpy as np

from formats.arrays import as_bytes
from formats.in_order import InOrder
from formats.outputs import Tap, Writer
from formats.remote.upload import FileUpload, Upload
from formats.spec import Array


class RemoteOutputs:
    """Files of an upload. `writer` is the layout of those that hold arrays."""

    def __init__(self, upload: Upload, writer: Writer) -> None:
        self.tap: Tap | None = None
        self._upload, self._sizes = upload, writer.files
        self._begun: dict[str, FileUpload] = {}
        self._arrays = InOrder(writer.spans, lambda file: upload.open(file, self._sizes[file]), lambda _, sink: sink.close())

    def write(self, file: str, offset: int, data: Array) -> None:
        """Upload an array once everything before it in the file was uploaded; blocks until then."""
        content = as_bytes(np.ascontiguousarray(data))
        self._arrays.put(file, offset, content)
        if self.tap:
            self.tap(file, offset, content)

    def begin(self, file: str, size: int) -> None:
        self._begun[file] = self._upload.open(file, size)

    def put(self, file: str, offset: int, data: bytes | memoryview) -> None:  # noqa: ARG002 - bytes arrive in order
        """Upload the next bytes of a file that was begun. Those around arrays have passed with the arrays."""
        if file not in self._sizes:
            self._begun[file].update(memoryview(data))

    def abandon(self) -> None:
        """Wake the threads that wait for bytes of other threads, which have failed."""
        self._arrays.abandon()

    def close(self) -> None:
        for sink in self._begun.values():
            sink.close()
        self._begun.clear()
