"""Bound the memory of the upload parts of all files.

A part is filled with its file's next bytes and freed after it is sent. A new part waits for parts that are being sent, because
these finish without further data. If all memory is held by parts that are being filled, waiting could last forever, because their
data may come later: the new part is then filled on disk.
"""

from __future__ import annotations

import errno
import mmap
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from formats.disk import read_exactly, write_all
from formats.errors import TransientError

PART_BYTES = 8 << 20
"""The services want 5 MiB at least; a file of more than 75 GB has larger ones."""

PART_MEMORY = 8 * PART_BYTES
"""Eight parts of 8 MiB: as many streams keep a fast network busy."""


class MemoryPart:
    """A part in memory."""

    in_memory = True

    def __init__(self, size: int) -> None:
        self.size = size
        self._data = mmap.mmap(-1, max(size, 1))  # given back to the system at once, which the heap of a thread is not

    def write(self, at: int, data: memoryview) -> None:
        self._data[at : at + len(data)] = data

    def send(self, send: Callable[[mmap.mmap], str]) -> str:
        data = self._data
        del self._data
        return send(data)

    def content(self) -> bytes:
        return self._data[: self.size]


class DiskPart:
    """A part in a temporary file that has no name. Several are sent one after another, since sending takes memory."""

    in_memory = False
    _one_at_a_time = threading.Lock()

    def __init__(self, size: int) -> None:
        self.size = size
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - see `__del__`

    def write(self, at: int, data: memoryview) -> None:
        try:
            write_all(self._file.fileno(), data, at)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise TransientError(
                f"no room left in `{tempfile.gettempdir()}` for a part of {self.size} bytes of an upload",
                hint="set TMPDIR to a directory with room for a part of each file",
            ) from error

    def send(self, send: Callable[[mmap.mmap], str]) -> str:
        with self._one_at_a_time:
            data = mmap.mmap(-1, self.size)
            read_exactly(self._file.fileno(), memoryview(data), 0, path=Path(tempfile.gettempdir()))
            self._file.close()
            return send(data)

    def __del__(self) -> None:
        """An upload that failed drops parts that were never sent."""
        self._file.close()


Part = MemoryPart | DiskPart


class PartMemory:
    """The memory limit described above, shared by threads."""

    def __init__(self, limit: int = PART_MEMORY) -> None:
        self._limit = limit
        self._held = self._sending = 0
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """Bytes of all parts that are in memory, being filled or on their way."""
        return self._held

    def part(self, size: int) -> Part:
        """Return a new part, to be filled and then sent."""
        return MemoryPart(size) if self._take(size) else DiskPart(size)

    def sending(self, part: Part) -> None:
        """Record that a part is being sent, and will be freed without further data."""
        with self._changed:
            self._sending += part.in_memory
            self._changed.notify_all()

    def sent(self, part: Part) -> None:
        """Record that a part was sent or has failed."""
        if part.in_memory:
            with self._changed:
                self._sending -= 1
                self._held -= part.size
                self._changed.notify_all()

    def _take(self, size: int) -> bool:
        with self._changed:
            while self._held and self._held + size > self._limit:
                if not self._sending:
                    return False
                self._changed.wait()
            self._held += size
            return True
