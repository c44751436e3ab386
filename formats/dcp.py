"""PyTorch's distributed-checkpoint container: files of `torch.save` archives, and an index that says where each is.

Each archive holds one chunk (a box of a tensor) or one object. Knows nothing of Megatron. Layout: torch's
`torch/distributed/checkpoint/filesystem.py`.
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
from formats.boxes import Stored, place_of, read_box, write_box
from formats.chunks import ChunkedTensor, Place, tiles
from formats.content import START_BYTES, refuse_start
from formats.dcp_index import METADATA, read_index
from formats.errors import UserError
from formats.folder import Folder
from formats.index_writer import index_document
from formats.outputs import Outputs
from formats.spec import Array, Document, Region, Shape, Span, dtype_name, extent, relative_to
from formats.torch_zip import DATA_ALIGNMENT, Frame, OpenArchive, contiguous_strides, tensor_frame

_MOST_AROUND = 4 * DATA_ALIGNMENT
"""More bytes than a frame has."""


class Container:
    """An opened folder: its tensors and objects by name. Nothing but `.metadata` is read until asked for."""

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
    def files(self) -> set[str]:
        """The files that hold tensors and objects, as the index names them."""
        return self._index.files

    @property
    def object_names(self) -> Iterable[str]:
        return self._index.objects

    def tensor(self, name: str) -> ChunkedTensor:
        """A tensor's shape, dtype and chunks.

        Raises UserError if the chunks overlap, leave holes or run past their files.
        """
        with self._lock:
            if name not in self._tensors:
                tensor = self._index.tensor(name)
                self._check_places(name, tensor)
                self._tensors[name] = tensor
                if len(self._tensors) == len(self._index.tensors):
                    self._index.forget_chunks()
        return self._tensors[name]

    def shape(self, name: str) -> Shape:
        return self._index.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._index.dtype(name)

    def object(self, name: str) -> Any:
        """An object's pickle, classes as inert records."""
        place = self._index.object(name)
        self._check_place(name, place)
        return self._archive(place).pickle()

    def read(self, tensor: ChunkedTensor, region: Region, out: Array) -> None:
        """Fill `out` with a region of the tensor, from whichever chunks hold it."""
        for number, chunk, shared in tensor.touching(region):
            part = out[(*relative_to(shared, region), ...)]  # the dots keep a single number an array that can be filled
            read_box(self._folder, self._locate(tensor, number, extent(chunk)), relative_to(shared, chunk), part)

    def close(self) -> None:
        self._folder.close()

    def _check_places(self, name: str, tensor: ChunkedTensor) -> None:
        """The last archive of a file is looked at for all of them."""
        table = tensor.table()
        files, stops = table[:, -4], table[:, -3] + table[:, -2]
        for file in set(files.tolist()):
            last = np.flatnonzero(files == file)[np.argmax(stops[files == file])]
            self._check_place(name, tensor.place(int(last)))

    def _check_place(self, name: str, place: Place) -> None:
        if place.compressed:
            raise UserError(f"`{name}` is stored compressed, which is not supported")
        _check_name(place.file)
        if place.offset + place.length > self._size(place.file):
            self._refuse_pointer(place.file)
            raise UserError(
                f"`{name}` runs past the end of `{place.file}`: it should lie at {place.offset} to "
                f"{place.offset + place.length}, the file has {self._size(place.file)} bytes",
                hint="the file is truncated; copy the checkpoint again",
            )

    def _refuse_pointer(self, file: str) -> None:
        """Raise UserError if a file is recognized as something else than the archives that it should hold."""
        start = bytearray(min(self._size(file), START_BYTES))
        self._folder.read_into(file, 0, memoryview(start))
        if not start.startswith(b"PK"):
            refuse_start(bytes(start), source=file)

    def _size(self, file: str) -> int:
        if file not in self._sizes:
            if not self._folder.has(file):
                raise UserError(f"`{METADATA}` names `{file}`, which is not in `{self._folder.label}`")
            self._sizes[file] = self._folder.size(file)
        return self._sizes[file]

    def _locate(self, tensor: ChunkedTensor, number: int, shape: Shape) -> Stored:
        place = tensor.place(number)
        if tensor.data_start(number) < 0:
            tensor.found_data(number, place.offset + self._data_start(place, shape, tensor.dtype))
        return Stored(place.file, tensor.data_start(number), shape)

    def _data_start(self, place: Place, shape: Shape, dtype: np.dtype[Any]) -> int:
        """Where in its archive a chunk's data starts; UserError if the archive describes another chunk."""
        if start := self._start_in_frame(place, shape, dtype):
            return start
        archive = self._archive(place)
        found, start = archive.tensor(archive.pickle())
        if _cut(found.shape) != _cut(shape) or found.dtype != dtype:
            raise UserError(
                f"`{place.file}` holds {list(found.shape)} of {dtype_name(found.dtype)} where `{METADATA}` "
                f"promises {list(shape)} of {dtype_name(dtype)}",
                hint="the checkpoint is damaged or was mixed from two",
            )
        if found.strides != contiguous_strides(found.shape) and prod(shape) > 1:
            raise UserError(f"`{place.file}` holds a tensor with strides {list(found.strides)}: not supported")
        return start

    def _start_in_frame(self, place: Place, shape: Shape, dtype: np.dtype[Any]) -> int:
        """Where in its archive a chunk's data starts if all around it is what is written here for that shape and dtype; else 0.

        Comparing takes two reads, and no unpickling: for hundreds of small chunks that is most of what reading them takes.
        """
        around = place.length - prod(shape) * dtype.itemsize
        frame = _frame(dtype, shape) if 0 < around <= _MOST_AROUND else None
        if frame is None or frame.length != place.length:
            return 0
        end = place.length - len(frame.after)
        same = (
            self._fetch(place, 0, len(frame.before)) == frame.before and self._fetch(place, end, len(frame.after)) == frame.after
        )
        return len(frame.before) if same else 0

    def _archive(self, place: Place) -> OpenArchive:
        return OpenArchive(lambda offset, length: self._fetch(place, offset, length), place.length, source=place.file)

    def _fetch(self, place: Place, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self._folder.read_into(place.file, place.offset + offset, memoryview(data))
        return bytes(data)


def _check_name(name: str) -> None:
    """File names stay in their directory. Where a link of that name leads is the user's business."""
    if name in ("", ".", "..") or len(name) > 255 or any(sign in name for sign in "/\\\0"):
        raise UserError(f"`{METADATA}` names the file `{name}`, which leaves the checkpoint's directory; it was not opened")


def _cut(shape: Shape) -> Shape:
    """A shape without its ones: stacked layers add one in front."""
    return tuple(size for size in shape if size != 1)


class NewObject(NamedTuple):
    """An object to be written: its archive is ready."""

    key: str
    file: str
    archive: bytes


class ContainerWriter:
    """The layout of a distributed checkpoint. Every offset is known before the first byte, so regions arrive in any order.

    `tensors` gives each key's global shape and dtype; the boxes of `parts` tile them. Each file holds its objects, then the
    chunks of `parts`, in the order given. `folder` is the files' folder in the output.
    """

    def __init__(
        self,
        folder: str,
        tensors: Mapping[str, tuple[Shape, np.dtype[Any]]],
        parts: Iterable[NewPart],
        objects: Iterable[NewObject],
    ) -> None:
        self._folder = folder
        self._files, self._objects = ArchiveFiles(), list[str]()
        files, frames, known = array("q"), array("q"), dict[bytes, int]()
        for new in objects:
            self._objects.append(new.key)
            files.append(self._files.file(new.file))
            if new.archive not in known:
                known[new.archive] = self._files.frame(Frame(new.archive, 0, b""))
            frames.append(known[new.archive])
        self._object_places = self._files.append(np.array(files, np.int64), np.array(frames, np.int64))
        self._chunked = append_parts(self._files, tensors, parts, _frame)
        for key, tensor in self._chunked.items():
            assert tiles(*tensor.boxes()), f"the chunks of {key} do not tile {tensor.shape}"

    @cached_property
    def metadata(self) -> Document:
        """Return `.metadata`, the index of all chunks and objects."""
        return index_document(self._chunked, (self._objects, self._object_places, self._files.names))

    @property
    def files(self) -> dict[str, int]:
        return {f"{self._folder}/{file}": end for file, end in self._files.sizes.items()}

    def spans(self, file: str) -> Iterator[Span]:
        """Yield the bytes of a file from its first to its last: archive frames, and the gaps that chunks fill."""
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
        """Return the byte offset in its file of a region's first element."""
        tensor = self._chunked[key]
        corner = tuple(slice(part.start, part.start + 1) for part in region)
        number, chunk, _ = next(tensor.touching(corner))
        return place_of(self._stored(tensor, number, extent(chunk)), relative_to(corner, chunk), tensor.dtype.itemsize)

    def touched(self, key: str, region: Region) -> set[str]:
        """Return the files that hold part of a region."""
        tensor = self._chunked[key]
        return {f"{self._folder}/{tensor.place(number).file}" for number, *_ in tensor.touching(region)}

    def write(self, outputs: Outputs, key: str, region: Region, data: Array) -> None:
        """Write a region of a tensor into the chunks that hold it."""
        tensor = self._chunked[key]
        for number, chunk, shared in tensor.touching(region):
            stored = self._stored(tensor, number, extent(chunk))
            write_box(outputs, stored, relative_to(shared, chunk), data[relative_to(shared, region)])

    def _stored(self, tensor: ChunkedTensor, number: int, shape: Shape) -> Stored:
        place = tensor.place(number)
        start = place.offset + len(_frame(tensor.dtype, shape).before)
        return Stored(f"{self._folder}/{place.file}", start, shape)


@cache
def _frame(dtype: np.dtype[Any], shape: Shape) -> Frame:
    """Frames repeat from layer to layer: one per dtype and shape is enough."""
    return tensor_frame(dtype_name(dtype), shape)
