"""PyTorch's distributed-checkpoint container: files of `torch.save` archives, and an index that says where each is.

Each archive holds one chunk (a box of a tensor) or one object. Knows nothing of Megatron. Layout: torch's
`torch/distributed/checkpoint/filesystem.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np

from formats.boxes import Stored, place_of, read_box, write_box
from formats.dcp_index import METADATA, Chunk, ChunkedTensor, Place, make_index, read_index
from formats.errors import UserError
from formats.folder import Folder
from formats.outputs import Outputs
from formats.spec import Array, Region, Shape, Span, dtype_name, extent, within
from formats.torch_zip import DATA_ALIGNMENT, Frame, OpenArchive, contiguous_strides, tensor_frame


class Container:
    """An opened folder: its tensors and objects by name. Nothing but `.metadata` is read until asked for."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._stored: dict[Place, Stored] = {}
        self._sizes: dict[str, int] = {}
        self._index = read_index(folder)

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
        tensor = self._index.tensor(name)
        for chunk in tensor.chunks:
            self._check_place(name, chunk.place)
        return tensor

    def shape(self, name: str) -> Shape:
        return self._index.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._index.dtype(name)

    def object(self, name: str) -> Any:
        """An object's pickle, classes as inert records."""
        place = self._index.place(name, None)
        self._check_place(name, place)
        return self._archive(place).pickle()

    def read(self, tensor: ChunkedTensor, region: Region, out: Array) -> None:
        """Fill `out` with a region of the tensor, from whichever chunks hold it."""
        for chunk, shared in tensor.touching(region):
            stored = self._locate(chunk, tensor.dtype)
            part = out[(*within(shared, region), ...)]  # the dots keep a single number an array that can be filled
            read_box(self._folder, stored, within(shared, chunk.region), part)

    def close(self) -> None:
        self._folder.close()

    def _check_place(self, name: str, place: Place) -> None:
        if place.compressed:
            raise UserError(f"`{name}` is stored compressed, which is not supported")
        _check_name(place.file)
        if place.offset + place.length > self._size(place.file):
            raise UserError(
                f"`{name}` runs past the end of `{place.file}`: it should lie at {place.offset} to "
                f"{place.offset + place.length}, the file has {self._size(place.file)} bytes",
                hint="the file is truncated; copy the checkpoint again",
            )

    def _size(self, file: str) -> int:
        if file not in self._sizes:
            if not self._folder.has(file):
                raise UserError(f"`{METADATA}` names `{file}`, which is not in `{self._folder.label}`")
            self._sizes[file] = self._folder.size(file)
        return self._sizes[file]

    def _locate(self, chunk: Chunk, dtype: np.dtype[Any]) -> Stored:
        if chunk.place not in self._stored:
            archive = self._archive(chunk.place)
            tensor, start = archive.tensor(archive.pickle())
            shape = extent(chunk.region)
            if _cut(tensor.shape) != _cut(shape) or tensor.dtype != dtype:
                raise UserError(
                    f"`{chunk.place.file}` holds {list(tensor.shape)} of {dtype_name(tensor.dtype)} where `{METADATA}` "
                    f"promises {list(shape)} of {dtype_name(dtype)}",
                    hint="the checkpoint is damaged or was mixed from two",
                )
            if tensor.strides != contiguous_strides(tensor.shape) and prod(shape) > 1:
                raise UserError(f"`{chunk.place.file}` holds a tensor with strides {list(tensor.strides)}: not supported")
            self._stored[chunk.place] = Stored(chunk.place.file, chunk.place.offset + start, shape)
        return self._stored[chunk.place]

    def _archive(self, place: Place) -> OpenArchive:
        def fetch(offset: int, length: int) -> bytes:
            data = bytearray(length)
            self._folder.read_into(place.file, place.offset + offset, memoryview(data))
            return bytes(data)

        return OpenArchive(fetch, place.length, source=place.file)


def _check_name(name: str) -> None:
    """File names stay in their directory. Where a link of that name leads is the user's business."""
    if name in ("", ".", "..") or len(name) > 255 or any(sign in name for sign in "/\\\0"):
        raise UserError(f"`{METADATA}` names the file `{name}`, which leaves the checkpoint's directory; it was not opened")


def _cut(shape: Shape) -> Shape:
    """A shape without its ones: stacked layers add one in front."""
    return tuple(size for size in shape if size != 1)


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk to be written: which tensor, which box of it, and in which file."""

    key: str
    region: Region
    file: str


@dataclass(frozen=True, slots=True)
class NewObject:
    """An object to be written: its archive is ready."""

    key: str
    file: str
    archive: bytes


class ContainerWriter:
    """Files being made. Every offset is known before the first byte, so regions arrive in any order.

    `tensors` gives each key's global shape and dtype; `chunks` tile them. Objects, then chunks, lie in their file in the
    order given. `folder` is where the files lie in the output.
    """

    def __init__(
        self,
        outputs: Outputs,
        folder: str,
        tensors: Mapping[str, tuple[Shape, np.dtype[Any]]],
        chunks: Sequence[NewChunk],
        objects: Sequence[NewObject],
    ) -> None:
        self._outputs, self._folder = outputs, folder
        self._ends: dict[str, int] = {}
        self._contents: dict[str, list[_Archived]] = {}
        self._objects: dict[str, Place] = {}
        for new in objects:
            self._objects[new.key] = self._take(new.file, Frame(new.archive, 0, b""))
        placed: dict[str, list[Chunk]] = {key: [] for key in tensors}
        for new in chunks:
            frame = _frame(tensors[new.key][1], extent(new.region))
            placed[new.key].append(Chunk(new.region, self._take(new.file, frame, alignment=DATA_ALIGNMENT)))
        self._chunked = {key: ChunkedTensor(*tensors[key], found) for key, found in placed.items()}

    def _take(self, file: str, frame: Frame, *, alignment: int = 1) -> Place:
        start = -(-self._ends.get(file, 0) // alignment) * alignment
        self._ends[file] = start + frame.length
        self._contents.setdefault(file, []).append(_Archived(start, frame))
        return Place(file, start, frame.length)

    @cached_property
    def metadata(self) -> bytes:
        """The index that makes the folder a checkpoint."""
        return make_index(self._chunked, self._objects)

    @property
    def files(self) -> dict[str, int]:
        return {f"{self._folder}/{file}": end for file, end in self._ends.items()}

    def spans(self, file: str) -> Iterator[Span]:
        """What lies around the data of a file, and where the data lies, from its first byte to its last."""
        known, at = b"", 0
        for start, frame in self._contents[file.removeprefix(f"{self._folder}/")]:
            known += bytes(start - at - len(known)) + frame.before
            if frame.size:
                yield Span(at, known)
                yield Span(at + len(known), None, frame.size)
                at, known = at + len(known) + frame.size, b""
            known += frame.after
        yield Span(at, known)

    def place(self, key: str, region: Region) -> int:
        """Where in its file the region's first byte goes."""
        corner = tuple(slice(part.start, part.start + 1) for part in region)
        chunk, _ = next(self._chunked[key].touching(corner))
        return place_of(self._stored(key, chunk), within(corner, chunk.region), self._chunked[key].dtype.itemsize)

    def touched(self, key: str, region: Region) -> set[str]:
        """The files that hold some of a region."""
        return {f"{self._folder}/{chunk.place.file}" for chunk, _ in self._chunked[key].touching(region)}

    def write(self, key: str, region: Region, data: Array) -> None:
        """Put a region of a tensor where its chunks lie."""
        for chunk, shared in self._chunked[key].touching(region):
            write_box(self._outputs, self._stored(key, chunk), within(shared, chunk.region), data[within(shared, region)])

    def _stored(self, key: str, chunk: Chunk) -> Stored:
        shape = extent(chunk.region)
        start = chunk.place.offset + len(_frame(self._chunked[key].dtype, shape).before)
        return Stored(f"{self._folder}/{chunk.place.file}", start, shape)


class _Archived(NamedTuple):
    """An archive of a file: where it starts, and what lies around its data."""

    start: int
    frame: Frame


@cache
def _frame(dtype: np.dtype[Any], shape: Shape) -> Frame:
    """Frames repeat from layer to layer: one per dtype and shape is enough."""
    return tensor_frame(dtype_name(dtype), shape)
