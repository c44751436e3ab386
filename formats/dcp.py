"""PyTorch's distributed-checkpoint container: a pickled index, `.metadata`, over files of `torch.save` archives.

Each archive holds one chunk (a box of a tensor) or one object. Knows nothing of Megatron. Layout: torch's
`torch/distributed/checkpoint/{metadata,filesystem}.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np

from formats.disk import Files, Stored, read_box, read_exactly, write_box, write_exactly
from formats.errors import UserError
from formats.pickles import Global, Record, dumps, loads
from formats.spec import Array, Region, Shape, dtype_name, extent, intersect, within
from formats.torch_zip import DTYPE_OF, TORCH_NAMES, Frame, OpenArchive, contiguous_strides, read_sizes, tensor_frame

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class Place:
    """An archive: bytes `offset` to `offset + length` of a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and the archive that holds it."""

    region: Region
    place: Place


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A tensor as its chunks, which together tile it."""

    shape: Shape
    dtype: np.dtype[Any]
    chunks: tuple[Chunk, ...]


class Container:
    """An opened directory: its tensors and objects by name. Nothing but `.metadata` is read until asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = Files()
        self._stored: dict[Place, Stored] = {}
        self._sizes: dict[str, int] = {}
        metadata = _load_metadata(directory)
        places = {_index_key(index): info for index, info in metadata["storage_data"].items()}
        self._places = places
        described = cast("dict[str, Record]", metadata["state_dict_metadata"])
        self._tensors = {k: v for k, v in described.items() if v.kind.name == "TensorStorageMetadata"}
        self._objects = {k for k, v in described.items() if v.kind.name == "BytesStorageMetadata"}

    @property
    def tensor_names(self) -> Iterable[str]:
        return self._tensors.keys()

    @property
    def object_names(self) -> Iterable[str]:
        return self._objects

    def tensor(self, name: str) -> ChunkedTensor:
        """A tensor's shape, dtype and chunks.

        Raises UserError if the chunks overlap, leave holes or run past their files.
        """
        record = self._tensors[name]
        shape = read_sizes(record["size"])
        chunks = tuple(self._chunk(name, chunk) for chunk in record["chunks"])
        _check_tiling(name, shape, [chunk.region for chunk in chunks])
        return ChunkedTensor(shape, _dtype(name, record["properties"]), chunks)

    def shape(self, name: str) -> Shape:
        return read_sizes(self._tensors[name]["size"])

    def dtype(self, name: str) -> np.dtype[Any]:
        return _dtype(name, self._tensors[name]["properties"])

    def object(self, name: str) -> Any:
        """An object's pickle, classes as inert records."""
        return self._archive(self._place(name, None)).pickle()

    def read(self, tensor: ChunkedTensor, region: Region, out: Array) -> None:
        """Fill `out` with a region of the tensor, from whichever chunks hold it."""
        for chunk in tensor.chunks:
            shared = intersect(chunk.region, region)
            if shared:
                stored = self._locate(chunk, tensor.dtype)
                read_box(self._files, stored, within(shared, chunk.region), out[within(shared, region)])

    def close(self) -> None:
        self._files.close()

    def _chunk(self, name: str, record: Record) -> Chunk:
        offsets, sizes = read_sizes(record["offsets"]), read_sizes(record["sizes"])
        region = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
        return Chunk(region, self._place(name, offsets))

    def _place(self, name: str, offsets: Shape | None) -> Place:
        info = self._places.get((name, offsets))
        if info is None:
            raise UserError(f"`{METADATA}` does not say where `{name}` at {list(offsets or ())} lies")
        if info.get("transform_descriptors"):
            raise UserError(f"`{name}` is stored compressed, which is not supported")
        place = Place(_plain_name(info["relative_path"]), int(info["offset"]), int(info["length"]))
        if place.offset < 0 or place.length < 0 or place.offset + place.length > self._size(place.file):
            raise UserError(
                f"`{name}` runs past the end of `{place.file}`: it should lie at {place.offset} to "
                f"{place.offset + place.length}, the file has {self._size(place.file)} bytes",
                hint="the file is truncated; copy the checkpoint again",
            )
        return place

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
            if prod(tensor.shape) != prod(shape) or tensor.dtype != dtype:
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


def _load_metadata(directory: Path) -> Record:
    path = directory / METADATA
    metadata = loads(path.read_bytes(), source=METADATA)
    match metadata:
        case Record(kind=Global(name="Metadata")) if isinstance(metadata.get("state_dict_metadata"), dict):
            if isinstance(metadata.get("storage_data"), dict):
                return metadata
        case _:
            pass
    raise UserError(f"`{path.name}` is not the index of a distributed checkpoint")


def _index_key(index: Record) -> tuple[str, Shape | None]:
    offset = index.get("offset")
    return index["fqn"], None if offset is None else read_sizes(offset)


def _dtype(name: str, properties: Record) -> np.dtype[Any]:
    match properties.state:
        case (Global(name=found), *_) | {"dtype": Global(name=found)} if found in DTYPE_OF:
            return DTYPE_OF[found]
        case state:
            raise UserError(f"`{name}` has properties `{state}`: their dtype is not supported")


def _plain_name(name: Any) -> str:
    """A file name that stays in its directory. Where a link of that name leads is the user's business."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UserError(f"`{METADATA}` names the file `{name}`, which leaves the checkpoint's directory; it was not opened")
    return name


def _check_tiling(name: str, shape: Shape, regions: Sequence[Region]) -> None:
    """Chunks must cover each element once."""
    if any(len(region) != len(shape) for region in regions):
        raise UserError(f"a chunk of `{name}` has another number of dimensions than its shape {list(shape)}")
    outside = [r for r in regions if any(part.stop > size for part, size in zip(r, shape, strict=True))]
    covered = sum(prod(extent(region)) for region in regions)
    if outside or covered != prod(shape) or not _tiles(shape, regions):
        raise UserError(
            f"the chunks of `{name}` do not tile its shape {list(shape)}: they overlap, leave holes or stick out",
            hint="the checkpoint is incomplete or damaged",
        )


def _tiles(shape: Shape, regions: Sequence[Region]) -> bool:
    """Do boxes tile a shape? Cut at every boundary along the first dimension, and ask each slab for the rest."""
    if not shape:
        return len(regions) == 1
    bounds = sorted({0, shape[0], *(r[0].start for r in regions), *(r[0].stop for r in regions)})
    by_span: dict[tuple[int, int], list[Region]] = {}
    for region in regions:
        by_span.setdefault((region[0].start, region[0].stop), []).append(region[1:])
    regular = all(span in by_span for span in pairwise(bounds)) and len(by_span) == len(bounds) - 1
    if regular:
        return all(_tiles(shape[1:], rest) for rest in by_span.values())
    slabs = pairwise(bounds)
    return all(_tiles(shape[1:], [r[1:] for r in regions if r[0].start <= a < r[0].stop]) for a, _ in slabs)


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
        self._tensors = tensors
        self._objects = objects
        self._files = Files(write=True)
        self._ends: dict[str, int] = {}
        self._object_places = [self._take(item.file, len(item.archive)) for item in objects]
        self._chunks: dict[str, list[tuple[Chunk, Frame]]] = {key: [] for key in tensors}
        frames = _remembered(tensor_frame)
        for new in chunks:
            frame = frames(dtype_name(tensors[new.key][1]), extent(new.region))
            self._chunks[new.key].append((Chunk(new.region, self._take(new.file, frame.length)), frame))

    def _take(self, file: str, length: int) -> Place:
        start = self._ends.get(file, 0)
        self._ends[file] = start + length
        return Place(file, start, length)

    @cached_property
    def metadata(self) -> bytes:
        return dumps(self._metadata())

    @property
    def files(self) -> dict[str, int]:
        return {**self._ends, METADATA: len(self.metadata)}

    def write(self, key: str, region: Region, data: Array) -> None:
        """Put a region of a tensor where its chunks lie."""
        for chunk, frame in self._chunks[key]:
            shared = intersect(chunk.region, region)
            if shared:
                start = chunk.place.offset + len(frame.before)
                stored = Stored(self._directory / chunk.place.file, start, extent(chunk.region))
                write_box(self._files, stored, within(shared, chunk.region), data[within(shared, region)])

    def finish(self) -> None:
        """Write objects, frames, and last the index that makes the directory a checkpoint."""
        for new, place in zip(self._objects, self._object_places, strict=True):
            self._put(place.file, place.offset, new.archive)
        for chunk, frame in (pair for pairs in self._chunks.values() for pair in pairs):
            self._put(chunk.place.file, chunk.place.offset, frame.before)
            self._put(chunk.place.file, chunk.place.offset + len(frame.before) + frame.size, frame.after)
        self._put(METADATA, 0, self.metadata)
        self.close()

    def close(self) -> None:
        self._files.close()

    def _put(self, file: str, offset: int, data: bytes) -> None:
        write_exactly(self._files.descriptor(self._directory / file), memoryview(data), offset)

    def _metadata(self) -> Record:
        described: dict[str, Record] = {}
        storage: dict[Record, Record] = {}
        for key, (shape, dtype) in self._tensors.items():
            chunks = [chunk for chunk, _ in self._chunks[key]]
            described[key] = _tensor_record(shape, dtype, chunks)
            for chunk in chunks:
                storage[_index_record(key, _starts(chunk.region))] = _info_record(chunk.place)
        for new, place in zip(self._objects, self._object_places, strict=True):
            described[new.key] = _metadata_record("BytesStorageMetadata", {})
            storage[_index_record(new.key, None)] = _info_record(place)
        fields = {"state_dict_metadata": described, "planner_data": None, "storage_data": storage}
        return _metadata_record("Metadata", {**fields, "storage_meta": None, "version": "1.0.0"})


def _remembered(make: Callable[..., Frame]) -> Callable[..., Frame]:
    """Frames repeat from layer to layer: one per dtype and shape is enough."""
    known: dict[Any, Frame] = {}

    def frame(*key: Any) -> Frame:
        if key not in known:
            known[key] = make(*key)
        return known[key]

    return frame


def _metadata_record(name: str, state: Any) -> Record:
    return Record(Global("torch.distributed.checkpoint.metadata", name), state=state, made_by_call=False)


def _size_record(shape: Shape) -> Record:
    return Global("torch", "Size")(shape)


def _starts(region: Region) -> Shape:
    return tuple(part.start for part in region)


def _index_record(key: str, offset: Shape | None) -> Record:
    where = None if offset is None else _size_record(offset)
    return _metadata_record("MetadataIndex", {"fqn": key, "offset": where, "index": None})


def _info_record(place: Place) -> Record:
    kind = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    state = {"relative_path": place.file, "offset": place.offset, "length": place.length}
    return Record(kind, state=state, made_by_call=False)


def _tensor_record(shape: Shape, dtype: np.dtype[Any], chunks: Sequence[Chunk]) -> Record:
    layout = Global("torch.serialization", "_get_layout")("torch.strided")
    memory_format = Global("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")(0)
    dtype_global = Global("torch", TORCH_NAMES[dtype_name(dtype)])
    properties = _metadata_record("TensorProperties", (dtype_global, layout, False, memory_format, False))
    boxes = [
        _metadata_record(
            "ChunkStorageMetadata",
            {"offsets": _size_record(_starts(c.region)), "sizes": _size_record(extent(c.region))},
        )
        for c in chunks
    ]
    return _metadata_record("TensorStorageMetadata", {"properties": properties, "size": _size_record(shape), "chunks": boxes})
