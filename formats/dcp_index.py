"""`.metadata`: the index of a distributed checkpoint, read. One pickle of torch's classes, here as records and numbers.

Says of every tensor its shape, dtype and chunks, and of every chunk and object in which bytes of which file it lies. Opens no
file but the index. Layout: torch's `torch/distributed/checkpoint/metadata.py`. Written by formats/index_writer.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import numpy as np

from formats.chunks import ChunkedTensor, Place, check_tiling, stride, untiled
from formats.content import refuse_start
from formats.errors import UserError, format_untrusted
from formats.faults import fault
from formats.folder import Folder
from formats.index_pickle import ELSEWHERE, OBJECT, ChunkRun, PlaceRun, load_index
from formats.pickles import Global, Record
from formats.spec import Array, Shape, is_size
from formats.torch_zip import DTYPE_OF, read_sizes

METADATA = ".metadata"
_LONGEST_NAME = 1024
_OF_OBJECT = -1  # instead of the number of a chunk's dimensions


class Index:
    """An index that was read. Only what is asked for is looked at closely."""

    def __init__(self, tensors: Mapping[str, Record], objects: set[str], places: _Locations) -> None:
        self.tensors, self.objects = tensors, objects
        self._places = places

    @property
    def files(self) -> set[str]:
        """Every file that holds something."""
        return set(self._places.files)

    def tensor(self, name: str) -> ChunkedTensor:
        """A tensor's shape, dtype and chunks; UserError if the chunks overlap or leave holes."""
        shape = self.shape(name)
        with _structured():
            boxes = _boxes(name, shape, self.tensors[name]["chunks"])
        numbers = np.full((len(boxes), stride(len(shape))), -1, np.int64)
        numbers[:, : 2 * len(shape)] = boxes
        numbers[:, 2 * len(shape) : -1] = self._places.of_chunks(name, shape, boxes[:, : len(shape)])
        made = ChunkedTensor(shape, self.dtype(name), array("q", numbers.tobytes()), self._places.files)
        check_tiling(name, made)
        return made

    def forget_chunks(self) -> None:
        """Let go of what tensors are made from, once all of them are made: tens of MiB."""
        for one in self.tensors.values():
            cast("dict[str, Any]", one.fields).pop("chunks")
        self._places.forget_chunks()

    def shape(self, name: str) -> Shape:
        with _structured():
            return read_sizes(self.tensors[name]["size"])

    def dtype(self, name: str) -> np.dtype[Any]:
        with _structured():
            return _dtype(name, self.tensors[name]["properties"])

    def object(self, name: str) -> Place:
        """Where an object lies."""
        return self._places.of_object(name)


def read_index(folder: Folder) -> Index:
    """The index of a folder; UserError if it is none, is misshapen, or puts two archives in the same bytes."""
    data = folder.get(METADATA)
    if not data.startswith(b"\x80"):  # a pickle does
        refuse_start(data, source=METADATA)
    return load_index(data, _index, source=METADATA)


def _index(loaded: Any) -> Index:
    with _structured():
        match loaded:
            case Record(kind=Global(name="Metadata"), state={"state_dict_metadata": {**described}, "storage_data": {**stored}}):
                places = _Locations(stored)
                objects = {name for name, one in described.items() if one is OBJECT or one.kind.name == "BytesStorageMetadata"}
                tensors = {
                    name: one
                    for name, one in described.items()
                    if name not in objects and one.kind.name == "TensorStorageMetadata"
                }
            case _:
                raise UserError(f"`{METADATA}` is not the index of a distributed checkpoint")
        for one in tensors.values():
            if any(part is ELSEWHERE for part in (one["size"], one["properties"], one["chunks"], *one["chunks"])):
                raise _unstructured("a chunk is there twice")
    if not all(_is_name(name) for name in described):
        raise _unstructured("a tensor's name is not text")
    return Index(tensors, objects, places)


def _boxes(name: str, shape: Shape, chunks: Iterable[Any]) -> Array:
    """The offsets and sizes of a tensor's chunks, [count, 2 * dims]."""
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
    """The columns of `_Places` while they are collected."""

    names: array[int] = field(default_factory=lambda: array("i"))
    files: array[int] = field(default_factory=lambda: array("i"))
    dims: array[int] = field(default_factory=lambda: array("b"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    spans: array[int] = field(default_factory=lambda: array("q"))


class _Locations:
    """Where every chunk and object lies: a row of numbers for each, found by name and by the chunk's offsets."""

    def __init__(self, stored: Mapping[Any, Any]) -> None:
        self._numbers: dict[str, int] = {}
        self._file_numbers: dict[str, int] = {}
        self._compressed: set[int] = set()
        rows = _Rows()
        for index, info in stored.items():
            if isinstance(index, PlaceRun):
                self._add_run(rows, index)
            else:
                self._add(rows, index, info)
        self.files = list(self._file_numbers)
        self._file, self._dims = np.frombuffer(rows.files, np.int32), np.frombuffer(rows.dims, np.int8)
        self._offsets = np.frombuffer(rows.offsets, np.int64)
        self._spans = np.frombuffer(rows.spans, np.int64).reshape(-1, 2)
        self._names = np.frombuffer(rows.names, np.int32)
        self._sort()
        self._check_apart(self._names)

    def _sort(self) -> None:
        counts = np.maximum(self._dims, 0)
        self._first = np.cumsum(counts, dtype=np.int64) - counts
        self._by_name = np.argsort(self._names, kind="stable").astype(np.int32)
        self._bounds = np.searchsorted(self._names[self._by_name], np.arange(len(self._numbers) + 1)).astype(np.int32)

    def forget_chunks(self) -> None:
        """Keep the rows of objects alone."""
        kept = np.flatnonzero(self._dims == _OF_OBJECT)
        self._compressed = {row for row, before in enumerate(kept.tolist()) if before in self._compressed}
        self._names, self._file, self._dims, self._spans = (
            column[kept] for column in (self._names, self._file, self._dims, self._spans)
        )
        self._offsets = self._offsets[:0]
        self._sort()

    def of_chunks(self, name: str, shape: Shape, corners: Array) -> Array:
        """The number of the file, the offset and the length of the archive of each chunk at `corners`, [count, 3]."""
        if np.any(corners > np.array(shape, np.int64)):
            raise untiled(name, shape)
        rows = self._rows(name)
        rows = rows[self._dims[rows] == len(shape)]
        at = self._offsets[self._first[rows, np.newaxis] + np.arange(len(shape))]
        inside = (at <= np.array(shape, np.int64)).all(axis=1)
        rows, both = rows[inside], _flat(np.concatenate([at[inside], corners]), shape)
        keys, wanted = both[: len(rows)], both[len(rows) :]
        order = np.argsort(keys, kind="stable")
        found = np.searchsorted(keys[order], wanted, side="right") - 1
        missing = (
            np.flatnonzero((found < 0) | (keys[order][np.maximum(found, 0)] != wanted)) if len(keys) else np.arange(len(corners))
        )
        if len(missing):
            raise _nowhere(name, corners[missing[0]].tolist())
        rows = rows[order[found]] if len(corners) else rows[:0]
        if self._compressed & set(rows.tolist()):
            raise UserError(f"`{name}` is stored compressed, which is not supported")
        return np.concatenate([self._file[rows, np.newaxis], self._spans[rows]], axis=1)

    def of_object(self, name: str) -> Place:
        rows = self._rows(name)
        rows = rows[self._dims[rows] == _OF_OBJECT]
        if not len(rows):
            raise _nowhere(name, [])
        row = int(rows[-1])
        offset, length = self._spans[row].tolist()
        return Place(self.files[int(self._file[row])], offset, length, row in self._compressed)

    def _rows(self, name: str) -> Array:
        number = self._numbers.get(name)
        return self._by_name[:0] if number is None else self._by_name[self._bounds[number] : self._bounds[number + 1]]

    def _add_run(self, rows: _Rows, run: PlaceRun) -> None:
        names, files = ({number: run.texts[number] for number in np.unique(part).tolist()} for part in (run.names, run.files))
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
            raise _unstructured("it does not say where an archive lies")
        if info.get("transform_descriptors"):
            self._compressed.add(len(rows.names))
        rows.names.append(self._name(index["fqn"]))
        rows.files.append(self._file_number(file))
        rows.dims.append(_OF_OBJECT if shape is None else len(shape))
        rows.offsets.extend(shape or ())
        rows.spans.extend((offset, length))

    def _name(self, name: Any) -> int:
        if not _is_name(name):
            raise _unstructured("a tensor's name is not text")
        return self._numbers.setdefault(name, len(self._numbers))

    def _file_number(self, file: str) -> int:
        return self._file_numbers.setdefault(file, len(self._file_numbers))

    def _check_apart(self, names: Array) -> None:
        """No byte may belong to two archives: such an index would give one tensor's data for another's."""
        order = np.lexsort((self._spans[:, 0], self._file)) if len(names) else np.empty(0, np.int64)
        starts, stops, files = self._spans[order, 0], self._spans[order].sum(axis=1), self._file[order]
        shared = np.flatnonzero((files[1:] == files[:-1]) & (starts[1:] < stops[:-1]))
        if len(shared):
            texts = list(self._numbers)
            one, other = (texts[names[order[shared[0] + step]]] for step in (0, 1))
            raise UserError(
                f"`{METADATA}` puts `{one}` and `{other}` in the same bytes of `{self.files[files[shared[0]]]}`",
                hint="the checkpoint is damaged or was mixed from two",
            )


def _translated(numbers: Array, meaning: Mapping[int, int]) -> Array:
    """Each number as another."""
    known = np.array(sorted(meaning), np.int64)
    return np.array([meaning[number] for number in known.tolist()], np.int32)[np.searchsorted(known, numbers)]


def _flat(corners: Array, shape: Shape) -> Array:
    """Corners inside a shape, or where an empty chunk may be, at its end: each as one number."""
    if prod(size + 1 for size in shape) >= 1 << 62:
        return np.unique(corners, axis=0, return_inverse=True)[1].reshape(-1)
    flat = np.zeros(len(corners), np.int64)
    for dim, size in enumerate(shape):
        flat = flat * (size + 1) + corners[:, dim]
    return flat


def _is_name(name: Any) -> bool:
    """Text, and not so long that taking names apart takes long."""
    return isinstance(name, str) and len(name) <= _LONGEST_NAME


def _dtype(name: str, properties: Record) -> np.dtype[Any]:
    match properties.state:
        case (Global(name=found), *_) | {"dtype": Global(name=found)} if found in DTYPE_OF:
            return DTYPE_OF[found]
        case _:
            raise UserError(f"`{name}` has a dtype that is not supported")


def _nowhere(name: str, offsets: list[int]) -> UserError:
    return UserError(f"`{METADATA}` does not say where `{name}` at {offsets} lies")


@contextmanager
def _structured() -> Generator[None]:
    """Turn what a misshapen index makes Python say into an error that names it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _unstructured(_misshapen(error)) from error


def _misshapen(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks `{format_untrusted(error.args[0])}`"
    return f"a value in it is of another kind ({fault(error)})"


def _unstructured(what: str) -> UserError:
    return UserError(f"`{METADATA}` is not built as torch builds it: {what}", hint="the file is damaged")
