"""Read `.metadata`, the index of a distributed checkpoint: one pickle of torch's classes, here as records and numbers.

The index gives the shape, dtype and chunks of every tensor, and the file, offset and length of every chunk and object. No other
file is opened. Layout: torch's `torch/distributed/checkpoint/metadata.py`. Written by formats/index_writer.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import numpy as np

from formats.arrays import distinct
from formats.chunks import ArchiveLocation, ChunkedTensor, check_tiling, stride, tiling_error
from formats.content import refuse_start
from formats.errors import UserError, format_untrusted
from formats.faults import fault
from formats.folder import Folder
from formats.index_pickle import ELSEWHERE, OBJECT, ChunkRun, LocationRun, load_index
from formats.pickles import Global, Record
from formats.spec import Array, Shape, is_size
from formats.torch_zip import DTYPE_OF, read_sizes

METADATA = ".metadata"
_LONGEST_NAME = 1024
_UNFLATTENED = "nd_reformulated_orig_global_shape"
_OF_OBJECT = -1  # instead of the number of a chunk's dimensions


class Index:
    """An index that was read. Tensors are checked when they are requested."""

    def __init__(
        self, tensors: Mapping[str, Record], objects: set[str], locations: _Locations, flattened: Mapping[str, Shape]
    ) -> None:
        self.tensors, self.objects, self.flattened = tensors, objects, flattened
        self._locations = locations

    @property
    def files(self) -> set[str]:
        """The files that hold chunks or objects, as the index names them."""
        return set(self._locations.files)

    def tensor(self, name: str) -> ChunkedTensor:
        """Return a tensor's shape, dtype and chunks; UserError if the chunks overlap or leave gaps."""
        shape = self.shape(name)
        with _malformed_is_user_error():
            shards = _bounds(name, shape, self.tensors[name]["chunks"])
        numbers = np.full((len(shards), stride(len(shape))), -1, np.int64)
        numbers[:, : 2 * len(shape)] = shards
        numbers[:, 2 * len(shape) : -1] = self._locations.of_chunks(name, shape, shards[:, : len(shape)])
        made = ChunkedTensor(shape, self.dtype(name), array("q", numbers.tobytes()), self._locations.files)
        check_tiling(name, made)
        return made

    def forget_chunks(self) -> None:
        """Free the records that tensors are built from (tens of MiB), once all tensors are built."""
        for record in self.tensors.values():
            cast("dict[str, Any]", record.fields).pop("chunks")
        self._locations.forget_chunks()

    def shape(self, name: str) -> Shape:
        with _malformed_is_user_error():
            return read_sizes(self.tensors[name]["size"])

    def dtype(self, name: str) -> np.dtype[Any]:
        with _malformed_is_user_error():
            return _dtype(name, self.tensors[name]["properties"])

    def object(self, name: str) -> ArchiveLocation:
        """Return the location of an object."""
        return self._locations.of_object(name)


def read_index(folder: Folder) -> Index:
    """Read the index of a folder. Raises UserError if it is malformed or puts two archives in the same bytes."""
    data = folder.get(METADATA)
    if not data.startswith(b"\x80"):  # a pickle does
        refuse_start(data, source=METADATA)
    return load_index(data, _index, source=METADATA)


def _index(loaded: Any) -> Index:
    with _malformed_is_user_error():
        match loaded:
            case Record(
                kind=Global(name="Metadata" | "MCoreMetadata"),
                state={"state_dict_metadata": {**described}, "storage_data": {**stored}} as state,
            ):
                locations, flattened = _Locations(stored), _flattened(state)
                objects = {
                    name for name, record in described.items() if record is OBJECT or record.kind.name == "BytesStorageMetadata"
                }
                tensors = {
                    name: record
                    for name, record in described.items()
                    if name not in objects and record.kind.name == "TensorStorageMetadata"
                }
            case _:
                raise UserError(f"`{METADATA}` is not the index of a distributed checkpoint")
        for record in tensors.values():
            if any(part is ELSEWHERE for part in (record["size"], record["properties"], record["chunks"], *record["chunks"])):
                raise _malformed("duplicate chunk")
    if not all(_is_name(name) for name in described):
        raise _malformed("a tensor's name is not text")
    return Index(tensors, objects, locations, flattened)


def _flattened(state: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shapes of the tensors that megatron-core up to 0.14 stored flattened: `[grid…, elements of a shard]`."""
    noted: dict[Any, Any] = state.get("mcore_data") or {}
    return {name: read_sizes(fields[_UNFLATTENED]) for name, fields in noted.items() if _UNFLATTENED in fields}


def _bounds(name: str, shape: Shape, chunks: Iterable[Any]) -> Array:
    """Return the offsets and sizes of a tensor's chunks, [chunks, 2 * dims]."""
    tables: list[Array] = []
    for chunk in chunks:
        if isinstance(chunk, ChunkRun):
            tables.append(chunk.table)
        else:
            tables.append(np.array([[*read_sizes(chunk["offsets"]), *read_sizes(chunk["sizes"])]], np.int64))
    if any(table.shape[1] != 2 * len(shape) for table in tables):
        raise UserError(f"a chunk of `{name}` has another number of dimensions than its shape {list(shape)}")
    return np.concatenate([np.empty((0, 2 * len(shape)), np.int64), *tables])


@dataclass(slots=True)
class _Rows:
    """The columns of `_Locations` while they are collected."""

    names: array[int] = field(default_factory=lambda: array("i"))
    files: array[int] = field(default_factory=lambda: array("i"))
    dims: array[int] = field(default_factory=lambda: array("b"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    spans: array[int] = field(default_factory=lambda: array("q"))


class _Locations:
    """The locations of all chunks and objects, a row of numbers each, looked up by name and by the chunk's offsets."""

    def __init__(self, stored: Mapping[Any, Any]) -> None:
        self._numbers: dict[str, int] = {}
        self._file_numbers: dict[str, int] = {}
        self._compressed: dict[int, str] = {}
        rows = _Rows()
        for index, info in stored.items():
            if isinstance(index, LocationRun):
                self._add_run(rows, index)
            else:
                self._add(rows, index, info)
        self.files = list(self._file_numbers)
        self._file, self._dims = np.frombuffer(rows.files, np.int32), np.frombuffer(rows.dims, np.int8)
        self._offsets = np.frombuffer(rows.offsets, np.int64)
        self._spans = np.frombuffer(rows.spans, np.int64).reshape(-1, 2)
        self._names = np.frombuffer(rows.names, np.int32)
        self._sort()
        self._check_disjoint(self._names)

    def _sort(self) -> None:
        counts = np.maximum(self._dims, 0)
        self._first = np.cumsum(counts, dtype=np.int64) - counts
        self._by_name = np.argsort(self._names, kind="stable").astype(np.int32)
        self._bounds = np.searchsorted(self._names[self._by_name], np.arange(len(self._numbers) + 1)).astype(np.int32)

    def forget_chunks(self) -> None:
        """Keep only the rows of objects."""
        kept = np.flatnonzero(self._dims == _OF_OBJECT)
        known = self._compressed
        self._compressed = {row: known[before] for row, before in enumerate(kept.tolist()) if before in known}
        self._names, self._file, self._dims, self._spans = (
            column[kept] for column in (self._names, self._file, self._dims, self._spans)
        )
        self._offsets = self._offsets[:0]
        self._sort()

    def of_chunks(self, name: str, shape: Shape, corners: Array) -> Array:
        """Return the location of the chunks at offsets `corners` [count, dims], as [count, 3]: file number, offset, length."""
        if np.any(corners > np.array(shape, np.int64)):
            raise tiling_error(name, shape)
        rows = self._rows(name)
        rows = rows[self._dims[rows] == len(shape)]
        at = self._offsets[self._first[rows, np.newaxis] + np.arange(len(shape))]
        inside = (at <= np.array(shape, np.int64)).all(axis=1)
        rows, both = rows[inside], _flat(np.concatenate([at[inside], corners]), shape)
        keys, wanted = both[: len(rows)], both[len(rows) :]
        order = np.argsort(keys, kind="stable")
        positions = np.searchsorted(keys[order], wanted, side="right") - 1
        missing = (
            np.flatnonzero((positions < 0) | (keys[order][np.maximum(positions, 0)] != wanted))
            if len(keys)
            else np.arange(len(corners))
        )
        if len(missing):
            raise _no_location(name, corners[missing[0]].tolist())
        rows = rows[order[positions]] if len(corners) else rows[:0]
        if compressed := self._compressed.keys() & set(rows.tolist()):
            raise compressed_error(name, self._compressed[min(compressed)])
        return np.concatenate([self._file[rows, np.newaxis], self._spans[rows]], axis=1)

    def of_object(self, name: str) -> ArchiveLocation:
        rows = self._rows(name)
        rows = rows[self._dims[rows] == _OF_OBJECT]
        if not len(rows):
            raise _no_location(name, [])
        row = int(rows[-1])
        offset, length = self._spans[row].tolist()
        return ArchiveLocation(self.files[int(self._file[row])], offset, length, self._compressed.get(row, ""))

    def _rows(self, name: str) -> Array:
        number = self._numbers.get(name)
        return self._by_name[:0] if number is None else self._by_name[self._bounds[number] : self._bounds[number + 1]]

    def _add_run(self, rows: _Rows, run: LocationRun) -> None:
        names, files = ({number: run.texts[number] for number in distinct(part)} for part in (run.names, run.files))
        rows.names.frombytes(_translated(run.names, {n: self._name(text) for n, text in names.items()}).tobytes())
        rows.files.frombytes(_translated(run.files, {n: self._file_number(text) for n, text in files.items()}).tobytes())
        dims = _OF_OBJECT if run.offsets is None else run.offsets.shape[1]
        rows.dims.frombytes(np.full(len(run.names), dims, np.int8).tobytes())
        rows.offsets.frombytes(b"" if run.offsets is None else run.offsets.tobytes())
        rows.spans.frombytes(run.spans.tobytes())

    def _add(self, rows: _Rows, index: Record, info: Record) -> None:
        offsets = index.get("offset")
        shape = None if offsets is None else read_sizes(offsets)
        file, offset, length = info["relative_path"], info["offset"], info["length"]
        if not isinstance(file, str) or not is_size(offset) or not is_size(length):
            raise _malformed("it does not give the location of an archive")
        if streams := info.get("transform_descriptors"):
            self._compressed[len(rows.names)] = format_untrusted(streams)
        rows.names.append(self._name(index["fqn"]))
        rows.files.append(self._file_number(file))
        rows.dims.append(_OF_OBJECT if shape is None else len(shape))
        rows.offsets.extend(shape or ())
        rows.spans.extend((offset, length))

    def _name(self, name: Any) -> int:
        if not _is_name(name):
            raise _malformed("a tensor's name is not text")
        return self._numbers.setdefault(name, len(self._numbers))

    def _file_number(self, file: str) -> int:
        return self._file_numbers.setdefault(file, len(self._file_numbers))

    def _check_disjoint(self, names: Array) -> None:
        """Raise UserError if two archives share bytes: such an index would return one tensor's data for another's."""
        order = np.lexsort((self._spans[:, 0], self._file)) if len(names) else np.empty(0, np.int64)
        starts, stops, files = self._spans[order, 0], self._spans[order].sum(axis=1), self._file[order]
        shared = np.flatnonzero((files[1:] == files[:-1]) & (starts[1:] < stops[:-1]))
        if len(shared):
            texts = list(self._numbers)
            name, other = (texts[names[order[shared[0] + step]]] for step in (0, 1))
            raise UserError(
                f"`{METADATA}` puts `{name}` and `{other}` in the same bytes of `{self.files[files[shared[0]]]}`",
                hint="the checkpoint is damaged or was mixed from two",
            )


def compressed_error(name: str, streams: str) -> UserError:
    """Return the error for an archive that is stored as `streams` of torch's extensions."""
    zstd = " with zstd" if "zstd" in streams else ""
    return UserError(
        f"`{name}` is stored compressed{zstd} (`{streams}`), which is not supported",
        hint="load it with `torch.distributed.checkpoint` and save it without `_extensions`",
    )


def _translated(numbers: Array, meaning: Mapping[int, int]) -> Array:
    """Map each number to the one that `meaning` gives for it."""
    known = np.array(sorted(meaning), np.int64)
    return np.array([meaning[number] for number in known.tolist()], np.int32)[np.searchsorted(known, numbers)]


def _flat(corners: Array, shape: Shape) -> Array:
    """Return each of `corners` [count, dims] as one number. A corner may lie at the end of `shape`: that of an empty chunk."""
    if prod(size + 1 for size in shape) >= 1 << 62:
        return np.unique(corners, axis=0, return_inverse=True)[1].reshape(-1)
    flat = np.zeros(len(corners), np.int64)
    for dim, size in enumerate(shape):
        flat = flat * (size + 1) + corners[:, dim]
    return flat


def _is_name(name: Any) -> bool:
    """Is `name` text of bounded length? Parsing longer names could take long."""
    return isinstance(name, str) and len(name) <= _LONGEST_NAME


def _dtype(name: str, properties: Record) -> np.dtype[Any]:
    match properties.state:
        case (Global(name=dtype), *_) | {"dtype": Global(name=dtype)} if dtype in DTYPE_OF:
            return DTYPE_OF[dtype]
        case _:
            raise UserError(f"`{name}` has a dtype that is not supported")


def _no_location(name: str, offsets: list[int]) -> UserError:
    return UserError(f"`{METADATA}` gives no location of `{name}` at {offsets}")


@contextmanager
def _malformed_is_user_error() -> Generator[None]:
    """Turn exceptions that a malformed index causes into a UserError that names it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _malformed(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks `{format_untrusted(error.args[0])}`"
    return f"a value in it has the wrong type ({fault(error)})"


def _malformed(what: str) -> UserError:
    return UserError(f"`{METADATA}` is not a valid index of torch: {what}", hint="the file is damaged")
