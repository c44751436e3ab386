"""`.metadata`: the index of a distributed checkpoint, read and made. One pickle of torch's classes, here as records.

Says of every tensor its shape, dtype and chunks, and of every chunk and object in which bytes of which file it lies. Opens no
file but the index. Layout: torch's `torch/distributed/checkpoint/metadata.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from formats.errors import UserError, shown
from formats.faults import fault
from formats.folder import Folder
from formats.pickles import Global, Record, dumps, loads
from formats.spec import Region, Shape, dtype_name, extent, intersect, whole_number
from formats.torch_zip import DTYPE_OF, TORCH_NAMES, read_sizes

METADATA = ".metadata"
_LONGEST_NAME = 1024


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


Places = Mapping[tuple[str, Shape | None], Place]
"""Where each chunk lies, by name and first corner, and each object, by name and None."""


class Index:
    """An index that was read. Only what is asked for is looked at closely."""

    def __init__(
        self, tensors: Mapping[str, Record], objects: set[str], places: Mapping[tuple[str, Shape | None], Place]
    ) -> None:
        self.tensors, self.objects = tensors, objects
        self._places = places

    @property
    def files(self) -> set[str]:
        """Every file that holds something."""
        return {place.file for place in self._places.values()}

    def tensor(self, name: str) -> ChunkedTensor:
        """A tensor's shape, dtype and chunks; UserError if the chunks overlap or leave holes."""
        with _structured():
            chunks = [self._chunk(name, chunk) for chunk in self.tensors[name]["chunks"]]
        shape = self.shape(name)
        _check_tiling(name, shape, [chunk.region for chunk in chunks])
        return ChunkedTensor(shape, self.dtype(name), chunks)

    def shape(self, name: str) -> Shape:
        with _structured():
            return read_sizes(self.tensors[name]["size"])

    def dtype(self, name: str) -> np.dtype[Any]:
        with _structured():
            return _dtype(name, self.tensors[name]["properties"])

    def place(self, name: str, offsets: Shape | None) -> Place:
        """Where the chunk at `offsets`, or with None an object, lies."""
        if (name, offsets) not in self._places:
            raise UserError(f"`{METADATA}` does not say where `{name}` at {list(offsets or ())} lies")
        return self._places[name, offsets]

    def _chunk(self, name: str, record: Record) -> Chunk:
        offsets, sizes = read_sizes(record["offsets"]), read_sizes(record["sizes"])
        region = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
        return Chunk(region, self.place(name, offsets))


def read_index(folder: Folder) -> Index:
    """The index of a folder; UserError if it is none, is misshapen, or puts two archives in the same bytes."""
    with _structured():
        match loads(folder.get(METADATA), source=METADATA):
            case Record(kind=Global(name="Metadata"), state={"state_dict_metadata": {**described}, "storage_data": {**stored}}):
                places = {_index_key(index): _info(info) for index, info in stored.items()}
                tensors = {name: one for name, one in described.items() if one.kind.name == "TensorStorageMetadata"}
                objects = {name for name, one in described.items() if one.kind.name == "BytesStorageMetadata"}
            case _:
                raise UserError(f"`{METADATA}` is not the index of a distributed checkpoint")
    if not all(_is_name(name) for name in described):
        raise _unstructured("a tensor's name is not text")
    _check_apart(places)
    return Index(tensors, objects, places)


def make_index(tensors: Mapping[str, ChunkedTensor], objects: Mapping[str, Place]) -> bytes:
    """The pickle that makes a directory a checkpoint."""
    described: dict[str, Record] = {}
    storage: dict[Record, Record] = {}
    for key, tensor in tensors.items():
        described[key] = _tensor_record(tensor)
        for chunk in tensor.chunks:
            storage[_index_record(key, _starts(chunk.region))] = _info_record(chunk.place)
    for key, place in objects.items():
        described[key] = _metadata_record("BytesStorageMetadata", {})
        storage[_index_record(key, None)] = _info_record(place)
    fields = {"state_dict_metadata": described, "planner_data": None, "storage_data": storage}
    return dumps(_metadata_record("Metadata", {**fields, "storage_meta": None, "version": "1.0.0"}))


def _index_key(index: Record) -> tuple[str, Shape | None]:
    name, offset = index["fqn"], index.get("offset")
    if not _is_name(name):
        raise _unstructured("a tensor's name is not text")
    return name, None if offset is None else read_sizes(offset)


def _is_name(name: Any) -> bool:
    """Text, and not so long that taking names apart takes long."""
    return isinstance(name, str) and len(name) <= _LONGEST_NAME


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


def _check_apart(places: Places) -> None:
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
        raise _unstructured(_misshapen(error)) from error


def _misshapen(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks `{shown(error.args[0])}`"
    return f"a value in it is of another kind ({fault(error)})"


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
    """Do boxes inside a shape tile it? Where they lie in slabs along the first dimension, as megatron-core's do, each slab is
    asked for the rest; else they must be apart and fill it. Cutting boxes that lie otherwise into slabs would double the
    work with every dimension."""
    if not shape:
        return len(regions) == 1
    bounds = sorted({0, shape[0], *(r[0].start for r in regions), *(r[0].stop for r in regions)})
    by_span: dict[tuple[int, int], list[Region]] = {}
    for region in regions:
        by_span.setdefault((region[0].start, region[0].stop), []).append(region[1:])
    regular = all(span in by_span for span in pairwise(bounds)) and len(by_span) == len(bounds) - 1
    if regular:
        return all(_tiles(shape[1:], rest) for rest in by_span.values())
    return sum(prod(extent(region)) for region in regions) == prod(shape) and _apart(regions)


def _apart(regions: Sequence[Region]) -> bool:
    """Do no two boxes share an element? Only those that share rows are compared."""
    ordered = sorted(regions, key=lambda region: region[0].start)
    for number, one in enumerate(ordered):
        for after in range(number + 1, len(ordered)):
            other = ordered[after]
            if other[0].start >= one[0].stop:
                break
            if intersect(one, other) is not None:
                return False
    return True


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
