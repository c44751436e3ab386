"""The two halves of writing a checkpoint: its layout (`Writer`), and the files that bytes go into (`Outputs`).

A writer computes offsets and holds no file, so that a plan with a writer can be made, printed and compared without a target.
`LocalOutputs` are files on a local disk, written past the page cache where the file system allows it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np

from formats.arrays import Buffer, as_bytes, copy
from formats.disk import direct_flag, forget, io_alignment, refuses_direct, write_all
from formats.open_files import Files
from formats.spec import Array, Document, Region, Span, TensorSpec

BYPASS_FROM = 64 << 10
"""Shorter writes go through the page cache."""


Tap = Callable[[str, int, memoryview], None]
"""Called for every array written, perhaps while it is: file, byte offset, bytes."""


def alongside[**P](
    pool: Executor, act: Callable[P, object] | None, *args: P.args, **kwargs: P.kwargs
) -> AbstractContextManager[None]:
    """Call `act`, if it is something, on a thread of the pool while the block runs, and wait for both.

    So a hash is taken while the disk writes the same bytes. After an error in the block, `act` is not waited for.
    """
    return _awaited(pool.submit(act, *args, **kwargs)) if act else _NOTHING


@contextmanager
def _awaited(future: Future[object]) -> Generator[None]:
    yield
    future.result()


_NOTHING = nullcontext()


class Outputs(Protocol):
    """Files being written. Names are relative to the output. Arrays may be written in any order, from any thread."""

    tap: Tap | None

    def write(self, file: str, offset: int, data: Array) -> None:
        """Write an array in C order at the byte `offset`."""
        ...

    def begin(self, file: str, size: int) -> None:
        """Start a file that `put` fills from its first byte to its last."""
        ...

    def put(self, file: str, offset: int, data: bytes | memoryview) -> None:
        """Write bytes that belong to no array at `offset`."""
        ...

    def abandon(self) -> None:
        """Wake threads that wait for writes of others, after a failure."""
        ...

    def close(self) -> None:
        """Close files or connections."""
        ...


class Writer(Protocol):
    """The layout of a checkpoint: its files, and the offset of every region of every tensor. Immutable; opens nothing."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def files(self) -> Mapping[str, int]:
        """The files that hold tensors, by relative name, and their sizes in bytes."""
        ...

    @property
    def documents(self) -> Mapping[str, Document]:
        """The metadata files, an index last."""
        ...

    @property
    def markers(self) -> Mapping[str, bytes]:
        """The files that are written when all others are complete, in this order."""
        ...

    def spans(self, file: str) -> Iterator[Span]:
        """Yield the bytes of a file from its first to its last: those known now, and the gaps that tensor data fills."""
        ...

    def touched(self, name: str, region: Region | None = None) -> set[str]:
        """Return the files that hold part of a tensor, or of a region of it."""
        ...

    def file_offset(self, name: str, region: Region) -> int:
        """Return the byte offset in its file of a region's first element.

        An array whose address has the same remainder by page is written without a copy.
        """
        ...

    def write(self, outputs: Outputs, name: str, region: Region, data: Array) -> None:
        """Write `data`, of the region's shape and the tensor's dtype, to its files in `outputs`. Thread-safe."""
        ...


class JoinedWriter:
    """Join the layouts of two writers whose tensors and files have different names. Names of the `other` are looked up: a model
    has hundreds of thousands of tensors, and the other should have few."""

    def __init__(self, first: Writer, other: Writer) -> None:
        self._first, self._other = first, other
        self._others = other.specs
        assert self._others.keys().isdisjoint(first.specs), "a tensor is in both layouts"

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {**self._first.specs, **self._others}

    @property
    def files(self) -> dict[str, int]:
        return {**self._first.files, **self._other.files}

    @property
    def documents(self) -> dict[str, Document]:
        return {**self._other.documents, **self._first.documents}

    @property
    def markers(self) -> dict[str, bytes]:
        return {**self._other.markers, **self._first.markers}

    def spans(self, file: str) -> Iterator[Span]:
        return (self._other if file in self._other.files else self._first).spans(file)

    def touched(self, name: str, region: Region | None = None) -> set[str]:
        return self._of(name).touched(name, region)

    def file_offset(self, name: str, region: Region) -> int:
        return self._of(name).file_offset(name, region)

    def write(self, outputs: Outputs, name: str, region: Region, data: Array) -> None:
        self._of(name).write(outputs, name, region, data)

    def _of(self, name: str) -> Writer:
        return self._other if name in self._others else self._first


class LocalOutputs:
    """Files below a directory that exists.

    Whole blocks of `io_alignment()` bytes bypass the page cache where the file system allows it: copying through the cache
    costs more processor time than the rest of a conversion, and evicts cached data of others. Partial blocks at the edges go
    through it.
    """

    def __init__(self, directory: Path, *, threads: int = 256) -> None:
        """`threads`: as many as write at the same time, or more. Each may wait for a thread of its own that taps."""
        self.directory = directory
        self.tap: Tap | None = None
        self._files = Files(os.O_RDWR | os.O_CREAT)
        self._may_bypass = bool(direct_flag())
        self._local = threading.local()
        self._paths: dict[str, Path] = {}
        self._taps = ThreadPoolExecutor(threads, thread_name_prefix="tap")

    def write(self, file: str, offset: int, data: Array) -> None:
        path, block = self._path(file), io_alignment()
        head, middle = -offset % block, (data.nbytes - -offset % block) // block * block
        if not self._may_bypass or middle < BYPASS_FROM:
            content = as_bytes(np.ascontiguousarray(data))
            with alongside(self._taps, self.tap, file, offset, content):
                self._write_buffered(path, (offset, content))
        else:
            content, end = self._aligned(data, offset), head + middle
            with alongside(self._taps, self.tap, file, offset, content):
                self._write_direct(path, offset + head, content[head:end])
                if head or end < len(content):
                    self._write_buffered(path, (offset, content[:head]), (offset + end, content[end:]))

    def begin(self, file: str, size: int) -> None:  # noqa: ARG002 - a file grows as it is written
        with self._files.using(self._path(file)):
            pass

    def put(self, file: str, offset: int, data: bytes | memoryview) -> None:
        self._write_buffered(self._path(file), (offset, memoryview(data)))

    def abandon(self) -> None:
        """Do nothing: no thread ever waits, since any offset can be written at any time."""

    def sync(self) -> None:
        """Flush everything written so far to the disk."""
        self._files.sync()

    def check(self) -> None:
        """Raise OSError if a file that was closed meanwhile is known to have lost data."""
        self._files.check()

    def close(self) -> None:
        self._taps.shutdown()
        self._files.close()

    def _aligned(self, data: Array, offset: int) -> memoryview:
        """Return the array's bytes at an address congruent to their file offset modulo `io_alignment()`; copies if needed."""
        if data.flags.c_contiguous and (data.ctypes.data - offset) % io_alignment() == 0:
            return as_bytes(data)
        if not hasattr(self._local, "buffer"):
            self._local.buffer = Buffer()
        aligned = self._local.buffer.view(data.shape, data.dtype, offset=offset)
        copy(aligned, data)
        return as_bytes(aligned)

    def _path(self, file: str) -> Path:
        """Return a file's path.

        Raises FileNotFoundError if the directory is gone: another run has removed or published it.
        """
        if file not in self._paths:  # building and hashing a path for each write takes longer than the system call
            self._paths[file] = self.directory / file
        if not os.path.isdir(self.directory):  # noqa: PTH112 - pathlib takes longer
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.directory))
        return self._paths[file]

    def _write_direct(self, path: Path, offset: int, data: memoryview) -> None:
        try:
            with self._files.using(path, direct_flag()) as descriptor:
                write_all(descriptor, data, offset)
        except OSError as error:
            if not refuses_direct(error):
                raise
            self._may_bypass = False
            self._write_buffered(path, (offset, data))

    def _write_buffered(self, path: Path, *parts: tuple[int, memoryview]) -> None:
        """Write parts through the page cache at their offsets; writeback of long parts starts at once, in parallel to reading."""
        with self._files.using(path) as descriptor:
            for offset, data in parts:
                write_all(descriptor, data, offset)
                if len(data) >= BYPASS_FROM:
                    forget(descriptor, offset, len(data))
