"""PyTorch's distributed-checkpoint container: a pickled index, `.metadata`, over files of `torch.save` archives.

Each archive holds one chunk (a box of a tensor) or one object. Knows nothing of Megatron. Layout: torch's
`torch/distributed/checkpoint/{metadata,filesystem}.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np

from formats.disk import Files, Outputs, Stored, place_of, read_box, read_exactly, write_box
from formats.errors import UserError
from formats.pickles import Global, Record, dumps, loads
from formats.spec import Array, Region, Shape, dtype_name, extent, intersect, whole_number, within
from formats.torch_zip import DTYPE_OF, PAGE, TORCH_NAMES, Frame, OpenArchive, contiguous_strides, read_sizes, tensor_frame

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class Place:
    """An archive: bytes `offset` to `offset + length` of a file."""

    file: str
    offset: int
    length: int
    compressed: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and the archive that holds it."""

    region: Region
    place: Place


class ChunkedTensor:
    """A tensor as its chunks, which together tile it."""

    def __init__(self, shape: Shape, dtype: np.dtype[Any], chunks: Iterable[Chunk]) -> None:
        self.shape, self.dtype = shape, dtype
        self.chunks = sorted(chunks, key=_first_row)
        self._longest = max((_rows(chunk).stop - _rows(chunk).start for chunk in self.chunks), default=0)

    def touching(self, region: Region) -> Iterator[tuple[Chunk, Region]]:
        """The chunks that share a box with a region, and the box. A tensor of stacked layers has thousands of chunks, so
        only those near the region's rows are looked at."""
        rows = region[0] if region else slice(0, 1)
        first = bisect_left(self.chunks, rows.start - self._longest + 1, key=_first_row)
        for chunk in self.chunks[first : bisect_left(self.chunks, rows.stop, key=_first_row)]:
            shared = intersect(chunk.region, region)
            if shared is not None:
                yield chunk, shared


def _rows(chunk: Chunk) -> slice:
    return chunk.region[0] if chunk.region else slice(0, 1)


def _first_row(chunk: Chunk) -> int:
    return _rows(chunk).start


class Container:
    """An opened directory: its tensors and objects by name. Nothing but `.metadata` is read until asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = Files()
        self._stored: dict[Place, Stored] = {}
        self._sizes: dict[str, int] = {}
        with _structured():
            metadata = _load_metadata(directory)
            self._places = {_index_key(index): _info(info) for index, info in metadata["storage_data"].items()}
            described = cast("dict[str, Record]", metadata["state_dict_metadata"])
            self._tensors = {k: v for k, v in described.items() if v.kind.name == "TensorStorageMetadata"}
            self._objects = {k for k, v in described.items() if v.kind.name == "BytesStorageMetadata"}
        if not all(isinstance(cast("Any", name), str) for name in described):
            raise _unstructured("a tensor's name is not text")
        _check_apart(self._places)

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
        with _structured():
            chunks = [self._chunk(name, chunk) for chunk in self._tensors[name]["chunks"]]
        shape = self.shape(name)
        _check_tiling(name, shape, [chunk.region for chunk in chunks])
        return ChunkedTensor(shape, self.dtype(name), chunks)

    def shape(self, name: str) -> Shape:
        with _structured():
            return read_sizes(self._tensors[name]["size"])

    def dtype(self, name: str) -> np.dtype[Any]:
        with _structured():
            return _dtype(name, self._tensors[name]["properties"])

    def object(self, name: str) -> Any:
        """An object's pickle, classes as inert records."""
        return self._archive(self._place(name, None)).pickle()

    def read(self, tensor: ChunkedTensor, region: Region, out: Array) -> None:
        """Fill `out` with a region of the tensor, from whichever chunks hold it."""
        for chunk, shared in tensor.touching(region):
            stored = self._locate(chunk, tensor.dtype)
            read_box(self._files, stored, within(shared, chunk.region), out[within(shared, region)])

    def close(self) -> None:
        self._files.close()

    def _chunk(self, name: str, record: Record) -> Chunk:
        offsets, sizes = read_sizes(record["offsets"]), read_sizes(record["sizes"])
        region = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
        return Chunk(region, self._place(name, offsets))

    def _place(self, name: str, offsets: Shape | None) -> Place:
        place = self._places.get((name, offsets))
        if place is None:
            raise UserError(f"`{METADATA}` does not say where `{name}` at {list(offsets or ())} lies")
        if place.compressed:
            raise UserError(f"`{name}` is stored compressed, which is not supported")
        _check_name(place.file)
        if place.offset + place.length > self._size(place.file):
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


def _cut(shape: Shape) -> Shape:
    """A shape without its ones: stacked layers add one in front."""
    return tuple(size for size in shape if size != 1)


def _dtype(name: str, properties: Record) -> np.dtype[Any]:
    match properties.state:
        case (Global(name=found), *_) | {"dtype": Global(name=found)} if found in DTYPE_OF:
            return DTYPE_OF[found]
        case _:
            raise UserError(f"`{name}` has a dtype that is not supported")


def _info(record: Record) -> Place:
    file, offset, length = record["relative_path"], record["offset"], record["length"]
    if not isinstance(file, str) or not whole_number(offset) or not whole_number(length):
        raise _unstructured("it does not say where an archive lies")
    return Place(file, offset, length, bool(record.get("transform_descriptors")))


def _check_name(name: str) -> None:
    """File names stay in their directory. Where a link of that name leads is the user's business."""
    if name in ("", ".", "..") or len(name) > 255 or any(sign in name for sign in "/\\\0"):
        raise UserError(f"`{METADATA}` names the file `{name}`, which leaves the checkpoint's directory; it was not opened")


def _check_apart(places: Mapping[tuple[str, Shape | None], Place]) -> None:
    """No byte may belong to two archives: such an index would give one tensor's data for another's."""
    ordered = sorted(places.items(), key=lambda item: (item[1].file, item[1].offset))
    for (one, before), (other, after) in pairwise(ordered):
        if before.file == after.file and after.offset < before.offset + before.length:
            raise UserError(
                f"`{METADATA}` puts `{one[0]}` and `{other[0]}` in the same bytes of `{after.file}`",
                hint="the checkpoint is damaged or was mixed from two",
            )


@contextmanager
def _structured() -> Generator[None]:
    """Turn what a misshapen index makes Python say into an error that names it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _unstructured(str(error)[:100]) from error


def _unstructured(what: str) -> UserError:
    return UserError(f"`{METADATA}` is not built as torch builds it: {what}", hint="the file is damaged")


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
        self._objects = objects
        self._outputs = Outputs()
        self._ends: dict[str, int] = {}
        self._object_places = [self._take(item.file, len(item.archive)) for item in objects]
        placed: dict[str, list[Chunk]] = {key: [] for key in tensors}
        for new in chunks:
            length = _frame(tensors[new.key][1], extent(new.region)).length
            placed[new.key].append(Chunk(new.region, self._take(new.file, length, alignment=PAGE)))
        self._chunked = {key: ChunkedTensor(*tensors[key], found) for key, found in placed.items()}

    def _take(self, file: str, length: int, *, alignment: int = 1) -> Place:
        start = -(-self._ends.get(file, 0) // alignment) * alignment
        self._ends[file] = start + length
        return Place(file, start, length)

    @cached_property
    def metadata(self) -> bytes:
        return dumps(self._metadata())

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

    def _metadata(self) -> Record:
        described: dict[str, Record] = {}
        storage: dict[Record, Record] = {}
        for key, tensor in self._chunked.items():
            described[key] = _tensor_record(tensor)
            for chunk in tensor.chunks:
                storage[_index_record(key, _starts(chunk.region))] = _info_record(chunk.place)
        for new, place in zip(self._objects, self._object_places, strict=True):
            described[new.key] = _metadata_record("BytesStorageMetadata", {})
            storage[_index_record(new.key, None)] = _info_record(place)
        fields = {"state_dict_metadata": described, "planner_data": None, "storage_data": storage}
        return _metadata_record("Metadata", {**fields, "storage_meta": None, "version": "1.0.0"})


@cache
def _frame(dtype: np.dtype[Any], shape: Shape) -> Frame:
    """Frames repeat from layer to layer: one per dtype and shape is enough."""
    return tensor_frame(dtype_name(dtype), shape)


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


def _tensor_record(tensor: ChunkedTensor) -> Record:
    layout = Global("torch.serialization", "_get_layout")("torch.strided")
    memory_format = Global("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")(0)
    fields = Global("torch", TORCH_NAMES[dtype_name(tensor.dtype)]), layout, False, memory_format, False
    properties = _metadata_record("TensorProperties", fields)
    boxes = [
        _metadata_record(
            "ChunkStorageMetadata",
            {"offsets": _size_record(_starts(c.region)), "sizes": _size_record(extent(c.region))},
        )
        for c in tensor.chunks
    ]
    return _metadata_record(
        "TensorStorageMetadata", {"properties": properties, "size": _size_record(tensor.shape), "chunks": boxes}
    )
