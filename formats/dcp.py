"""PyTorch's distributed-checkpoint container: files of `torch.save` archives, and an index of their locations.

Each archive holds one chunk (a region of a tensor) or one object. Megatron's naming is left to `torch_dist.py`. Layout:
torch's `torch/distributed/checkpoint/filesystem.py`.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np

from formats.archive_files import ArchiveFiles, NewPart, append_parts
from formats.chunks import ArchiveLocation, ChunkedTensor, tiles
from formats.content import START_BYTES, refuse_start
from formats.dcp_index import METADATA, compressed_error, read_index
from formats.errors import UserError
from formats.folder import Folder
from formats.index_writer import index_document
from formats.object_names import ObjectName, ObjectNames
from formats.outputs import Outputs
from formats.relative_names import check_below
from formats.spec import Array, Document, Region, Shape, Span, dtype_name
from formats.stored_arrays import StoredArray, file_offset, read_region, write_region
from formats.torch_zip import DATA_ALIGNMENT, Frame, OpenArchive, contiguous_strides, tensor_frame

_MOST_AROUND = 4 * DATA_ALIGNMENT
"""An upper bound for the bytes of a frame."""


class DcpContainer:
    """PyTorch's container, opened; see `Container`. Opening reads `.metadata` only."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._sizes: dict[str, int] = {}
        self._index = read_index(folder)
        self._tensors: dict[str, ChunkedTensor] = {}
        self._lock = threading.Lock()

    @property
    def tensor_names(self) -> Iterable[str]:
        return self._index.tensors

    @property
    def index_files(self) -> set[str]:
        return {METADATA}

    @property
    def files(self) -> set[str]:
        """The files that hold tensors and objects, as the index names them."""
        return self._index.files

    @property
    def object_names(self) -> Iterable[str]:
        return self._index.objects

    @property
    def flattened(self) -> Mapping[str, Shape]:
        """The shapes of the tensors that are stored flattened: see `optimizer/flattened.py`."""
        return self._index.flattened

    def tensor(self, name: str) -> ChunkedTensor:
        """Return a tensor's shape, dtype and chunks.

        Raises UserError if the chunks overlap, leave gaps or run past their files.
        """
        with self._lock:
            if name not in self._tensors:
                tensor = self._index.tensor(name)
                self._check_locations(name, tensor)
                self._tensors[name] = tensor
                if len(self._tensors) == len(self._index.tensors):
                    self._index.forget_chunks()
        return self._tensors[name]

    def shape(self, name: str) -> Shape:
        return self._index.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._index.dtype(name)

    def archive(self, name: str) -> OpenArchive:
        location = self._index.object(name)
        self._check_location(name, location)
        return self._archive(location)

    def read(self, tensor: ChunkedTensor, region: Region, out: Array) -> None:
        """Read a region of the tensor into `out`, from all chunks that overlap it."""
        for number, shape, in_chunk, in_region in tensor.overlapping(region):
            part = out[(*in_region, ...)]  # the ellipsis keeps a single number an array
            read_region(self._folder, self._locate(tensor, number, shape), in_chunk, part)

    def close(self) -> None:
        self._folder.close()

    def _check_locations(self, name: str, tensor: ChunkedTensor) -> None:
        """Check the last archive of each file, which stands for all others in it."""
        table = tensor.table()
        files, stops = table[:, -4], table[:, -3] + table[:, -2]
        for file in set(files.tolist()):
            last = np.flatnonzero(files == file)[np.argmax(stops[files == file])]
            self._check_location(name, tensor.location(int(last)))

    def _check_location(self, name: str, location: ArchiveLocation) -> None:
        if location.compressed:
            raise compressed_error(name, location.compressed)
        check_below(location.file, source=METADATA)
        if location.offset + location.length > self._size(location.file):
            self._refuse_pointer(location.file)
            raise UserError(
                f"`{name}` runs past the end of `{location.file}`: its bytes are {location.offset} to "
                f"{location.offset + location.length}, the file has {self._size(location.file)} bytes",
                hint="the file is truncated; copy the checkpoint again",
            )

    def _refuse_pointer(self, file: str) -> None:
        """Raise UserError if a file is recognized as something other than archives."""
        start = bytearray(min(self._size(file), START_BYTES))
        self._folder.read_into(file, 0, memoryview(start))
        if not start.startswith(b"PK"):
            refuse_start(bytes(start), source=file)

    def _size(self, file: str) -> int:
        if file not in self._sizes:
            if not self._folder.has(file):
                raise UserError(
                    f"`{METADATA}` names `{file}`, which is not in `{self._folder.label}`",
                    hint="the checkpoint is incomplete: copy it again, or use an earlier iteration",
                )
            self._sizes[file] = self._folder.size(file)
        return self._sizes[file]

    def _locate(self, tensor: ChunkedTensor, number: int, shape: Shape) -> StoredArray:
        start = tensor.data_start(number)
        if start < 0:
            location = tensor.location(number)
            start = location.offset + self._data_start(location, shape, tensor.dtype)
            tensor.set_data_start(number, start)
        return StoredArray(tensor.file(number), start, shape)

    def _data_start(self, location: ArchiveLocation, shape: Shape, dtype: np.dtype[Any]) -> int:
        """Return the offset of a chunk's data in its archive; UserError if the archive describes another chunk."""
        if start := self._start_in_frame(location, shape, dtype):
            return start
        archive = self._archive(location)
        stored, start = archive.tensor(archive.pickle())
        if _without_ones(stored.shape) != _without_ones(shape) or stored.dtype != dtype:
            raise UserError(
                f"`{location.file}` holds {list(stored.shape)} of {dtype_name(stored.dtype)}, but `{METADATA}` "
                f"says {list(shape)} of {dtype_name(dtype)}",
                hint="the checkpoint is damaged or was mixed from two",
            )
        if stored.strides != contiguous_strides(stored.shape) and prod(shape) > 1:
            raise UserError(f"`{location.file}` holds a tensor with strides {list(stored.strides)}, which is not supported")
        return start

    def _start_in_frame(self, location: ArchiveLocation, shape: Shape, dtype: np.dtype[Any]) -> int:
        """Return the offset of a chunk's data in an archive that equals our frame for that shape and dtype; else 0.

        The comparison takes two reads and no unpickling, which would dominate the time of reading small chunks.
        """
        around = location.length - prod(shape) * dtype.itemsize
        frame = _frame(dtype, shape) if 0 < around <= _MOST_AROUND else None
        if frame is None or frame.length != location.length:
            return 0
        end = location.length - len(frame.after)
        same = (
            self._fetch(location, 0, len(frame.before)) == frame.before
            and self._fetch(location, end, len(frame.after)) == frame.after
        )
        return len(frame.before) if same else 0

    def _archive(self, location: ArchiveLocation) -> OpenArchive:
        return OpenArchive(lambda offset, length: self._fetch(location, offset, length), location.length, source=location.file)

    def _fetch(self, location: ArchiveLocation, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self._folder.read_into(location.file, location.offset + offset, memoryview(data))
        return bytes(data)


def _without_ones(shape: Shape) -> Shape:
    """Return a shape without its ones: megatron-core adds one in front of stacked layers."""
    return tuple(size for size in shape if size != 1)


class NewObject(NamedTuple):
    """An object to write, with its complete archive."""

    name: ObjectName
    file: str
    archive: bytes


class ContainerWriter:
    """The layout of a distributed checkpoint. Offsets are known before the first byte, so regions may be written in any order.

    `tensors` gives each key's global shape and dtype, which the shards of `parts` tile. Each file holds objects first, then
    chunks, in the order given. `folder` is the container's folder in the output.
    """

    def __init__(
        self,
        folder: str,
        tensors: Mapping[str, tuple[Shape, np.dtype[Any]]],
        parts: Iterable[NewPart],
        objects: Iterable[NewObject],
    ) -> None:
        self._folder = folder
        self._files, self._objects = ArchiveFiles(), ObjectNames()
        files, frames, known = array("q"), array("q"), dict[bytes, int]()
        for new in objects:
            self._objects.append(new.name)
            files.append(self._files.file(new.file))
            if new.archive not in known:
                known[new.archive] = self._files.frame(Frame(new.archive, 0, b""))
            frames.append(known[new.archive])
        self._object_locations = self._files.append(np.array(files, np.int64), np.array(frames, np.int64))
        self._chunked = append_parts(self._files, tensors, parts, _frame)
        for key, tensor in self._chunked.items():
            if not tiles(*tensor.bounds()):
                raise ValueError(f"the chunks to be written of `{key}` do not tile its shape {list(tensor.shape)}")

    @cached_property
    def metadata(self) -> Document:
        """Return `.metadata`, the index of all chunks and objects."""
        return index_document(self._chunked, (self._objects, self._object_locations, self._files.names))

    @property
    def files(self) -> dict[str, int]:
        return {f"{self._folder}/{file}": end for file, end in self._files.sizes.items()}

    def spans(self, file: str) -> Iterator[Span]:
        """Yield the known bytes and the data ranges of a file, from its first byte to its last."""
        known, at = b"", 0
        for start, frame in self._files.content(file.removeprefix(f"{self._folder}/")):
            known += bytes(start - at - len(known)) + frame.before
            if frame.size:
                yield Span(at, known)
                yield Span(at + len(known), None, frame.size)
                at, known = at + len(known) + frame.size, b""
            known += frame.after
        yield Span(at, known)

    def file_offset(self, key: str, region: Region) -> int:
        """Return the byte offset in its file of the region's first element."""
        tensor = self._chunked[key]
        corner = tuple(slice(part.start, part.start + 1) for part in region)
        number, shape, in_chunk, _ = next(tensor.overlapping(corner))
        return file_offset(self._stored(tensor, number, shape), in_chunk, tensor.dtype.itemsize)

    def touched(self, key: str, region: Region) -> set[str]:
        """Return the files that hold part of a region."""
        tensor = self._chunked[key]
        return {f"{self._folder}/{tensor.file(number)}" for number, *_ in tensor.overlapping(region)}

    def write(self, outputs: Outputs, key: str, region: Region, data: Array) -> None:
        """Write a region of a tensor into its chunks."""
        tensor = self._chunked[key]
        for number, shape, in_chunk, in_region in tensor.overlapping(region):
            write_region(outputs, self._stored(tensor, number, shape), in_chunk, data[in_region])

    def _stored(self, tensor: ChunkedTensor, number: int, shape: Shape) -> StoredArray:
        start = tensor.data_start(number)
        if start < 0:
            start = tensor.location(number).offset + len(_frame(tensor.dtype, shape).before)
            tensor.set_data_start(number, start)
        return StoredArray(f"{self._folder}/{tensor.file(number)}", start, shape)


@cache
def _frame(dtype: np.dtype[Any], shape: Shape) -> Frame:
    """Return the frame of a chunk, cached: frames repeat from layer to layer."""
    return tensor_frame(dtype_name(dtype), shape)
