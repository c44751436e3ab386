"""PyTorch's distributed-checkpoint container: files of `torch.save` archives, and an index that says where each is.

Each archive holds one chunk (a box of a tensor) or one object. Knows nothing of Megatron. Layout: torch's
`torch/distributed/checkpoint/filesystem.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from formats.dcp_index import METADATA, Chunk, ChunkedTensor, Place, make_index, read_index
from formats.disk import BLOCK, Files, Outputs, Stored, place_of, read_box, read_exactly, write_box
from formats.errors import UserError
from formats.spec import Array, Region, Shape, dtype_name, extent, within
from formats.torch_zip import Frame, OpenArchive, contiguous_strides, tensor_frame


class Container:
    """An opened directory: its tensors and objects by name. Nothing but `.metadata` is read until asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = Files()
        self._stored: dict[Place, Stored] = {}
        self._sizes: dict[str, int] = {}
        self._index = read_index(directory)

    @property
    def tensor_names(self) -> Iterable[str]:
        return self._index.tensors

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
            read_box(self._files, stored, within(shared, chunk.region), part)

    def close(self) -> None:
        self._files.close()

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
            path = self._directory / file
            if not path.is_file():
                raise UserError(f"`{METADATA}` names `{file}`, which is not in `{self._directory}`")
            self._sizes[file] = path.stat().st_size
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
            path = self._directory / chunk.place.file
            self._stored[chunk.place] = Stored(path, chunk.place.offset + start, shape)
        return self._stored[chunk.place]

    def _archive(self, place: Place) -> OpenArchive:
        path = self._directory / place.file
        descriptor = self._files.descriptor(path)

        def fetch(offset: int, length: int) -> bytes:
            data = bytearray(length)
            read_exactly(descriptor, memoryview(data), place.offset + offset, path=path)
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
    """A directory being made. Every offset is known before the first byte, so regions arrive in any order.

    `tensors` gives each key's global shape and dtype; `chunks` tile them. Objects, then chunks, lie in their file in the
    order given.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, tuple[Shape, np.dtype[Any]]],
        chunks: Sequence[NewChunk],
        objects: Sequence[NewObject],
    ) -> None:
        self._directory = directory
        self._objects = objects
        self._outputs = Outputs()
        self._ends: dict[str, int] = {}
        self._object_places = [self._take(item.file, len(item.archive)) for item in objects]
        placed: dict[str, list[Chunk]] = {key: [] for key in tensors}
        for new in chunks:
            length = _frame(tensors[new.key][1], extent(new.region)).length
            placed[new.key].append(Chunk(new.region, self._take(new.file, length, alignment=BLOCK)))
        self._chunked = {key: ChunkedTensor(*tensors[key], found) for key, found in placed.items()}

    def _take(self, file: str, length: int, *, alignment: int = 1) -> Place:
        start = -(-self._ends.get(file, 0) // alignment) * alignment
        self._ends[file] = start + length
        return Place(file, start, length)

    @cached_property
    def metadata(self) -> bytes:
        places = {new.key: place for new, place in zip(self._objects, self._object_places, strict=True)}
        return make_index(self._chunked, places)

    @property
    def files(self) -> dict[str, int]:
        return {**self._ends, METADATA: len(self.metadata)}

    def place(self, key: str, region: Region) -> int:
        """Where in its file the region's first byte goes."""
        corner = tuple(slice(part.start, part.start + 1) for part in region)
        chunk, _ = next(self._chunked[key].touching(corner))
        return place_of(self._stored(key, chunk), within(corner, chunk.region), self._chunked[key].dtype.itemsize)

    def write(self, key: str, region: Region, data: Array) -> None:
        """Put a region of a tensor where its chunks lie."""
        for chunk, shared in self._chunked[key].touching(region):
            write_box(self._outputs, self._stored(key, chunk), within(shared, chunk.region), data[within(shared, region)])

    def _stored(self, key: str, chunk: Chunk) -> Stored:
        shape = extent(chunk.region)
        start = chunk.place.offset + len(_frame(self._chunked[key].dtype, shape).before)
        return Stored(self._directory / chunk.place.file, start, shape)

    def finish(self) -> None:
        """Write objects, frames, and last the index that makes the directory a checkpoint."""
        for new, place in zip(self._objects, self._object_places, strict=True):
            self._put(place.file, place.offset, new.archive)
        for tensor in self._chunked.values():
            for chunk in tensor.chunks:
                frame = _frame(tensor.dtype, extent(chunk.region))
                self._put(chunk.place.file, chunk.place.offset, frame.before)
                self._put(chunk.place.file, chunk.place.offset + len(frame.before) + frame.size, frame.after)
        self._put(METADATA, 0, self.metadata)
        self.close()

    def close(self) -> None:
        self._outputs.close()

    def _put(self, file: str, offset: int, data: bytes) -> None:
        self._outputs.put(self._directory / file, offset, data)


@cache
def _frame(dtype: np.dtype[Any], shape: Shape) -> Frame:
    """Frames repeat from layer to layer: one per dtype and shape is enough."""
    return tensor_frame(dtype_name(dtype), shape)
