"""Write `.metadata`, the index of a distributed checkpoint.

Its records differ in a few numbers, so each is built from byte templates: pickling objects would take seconds and hundreds of MiB
for 100,000 chunks. The size is computed without building it. Layout: see formats/dcp_index.py.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice

import numpy as np

from formats.arrays import distinct
from formats.chunks import ChunkedTensor
from formats.dtypes import Dtype
from formats.pickles import Global
from formats.spec import Array, Document, names_of

_METADATA = "torch.distributed.checkpoint.metadata"
_CHUNK = Global(_METADATA, "ChunkStorageMetadata")
_INDEX = Global(_METADATA, "MetadataIndex")
_BYTES = Global(_METADATA, "BytesStorageMetadata")
_TENSOR = Global(_METADATA, "TensorStorageMetadata")
_PROPERTIES = Global(_METADATA, "TensorProperties")
_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Global("torch", "Size")

_BARE = pickle.MARK + pickle.TUPLE + pickle.NEWOBJ  # an instance without arguments
_DICT = pickle.EMPTY_DICT + pickle.MARK
_END = pickle.SETITEMS + pickle.BUILD
_SIZE_START, _SIZE_END = pickle.MARK * 2, pickle.TUPLE * 2 + pickle.REDUCE
_BLOCK = 1 << 18
_AT_ONCE = 1 << 12

Archives = tuple[Sequence[str], Array, list[str]]
"""Objects: their names, [count, 3] the number of the file, offset and length of each, and the files' names."""


def index_document(tensors: Mapping[str, ChunkedTensor], objects: Archives) -> Document:
    """Return the index of tensors and objects, as a document that is made when it is written."""
    return Document(_size(tensors, objects), lambda: _blocks(_Writer().parts(tensors, objects)))


def _blocks(parts: Iterable[bytes]) -> Iterator[bytes]:
    block = bytearray()
    for part in parts:
        block += part
        if len(block) >= _BLOCK:
            yield bytes(block)
            block.clear()
    yield bytes(block)


def _size(tensors: Mapping[str, ChunkedTensor], objects: Archives) -> int:
    """Bytes of the pickle: those of one with the first chunk of each tensor and the first object, and what the others add,
    which differ in numbers and in the names that are spelled out where they come first."""
    writer, (names, locations, files) = _Writer(), objects
    total = sum(map(len, writer.parts(tensors, (names[:1], locations[:1], files), most=1)))
    known = set(writer.known)
    spelled = known | {files[number] for number in distinct(locations[:, 0])}
    if files:
        writer.name(files[0])  # so that what a record adds is counted without the name
    for key, tensor in tensors.items():
        if not len(tensor):
            continue
        dims, table = len(tensor.shape), tensor.table()[1:]
        file = tensor.files[int(tensor.table()[0, -4])]  # a name that is spelled already
        zeros = [0] * dims
        each = len(writer.chunk(zeros, zeros)) + len(writer.location(key, zeros, file, 0, 0)) - len(_number(0)) * (3 * dims + 2)
        total += each * len(table) + _digits(table[:, : 2 * dims]) + _digits(table[:, :dims]) + _digits(table[:, -3:-1])
        spelled |= {tensor.files[number] for number in distinct(table[:, -4])}
    total += sum(len(_spelled(name)) for name in islice(names, 1, None) if name not in spelled)
    if names:
        each = (
            len(writer.object(names[0]))
            + len(writer.location(names[0], None, files[int(locations[0, 0])], 0, 0))
            - 2 * len(_number(0))
        )
        total += each * (len(names) - 1) + _digits(locations[1:, 1:])
    return total + sum(len(_spelled(name)) for name in spelled - known)


_DIGITS_FROM = np.array([1 << 8, 1 << 31, 1 << 39, 1 << 47, 1 << 55], np.int64)
_DIGITS = np.array([2, 5, 7, 8, 9, 10])


def _digits(table: Array) -> int:
    """Bytes of the opcodes of all numbers of a table, a column at a time: a large model has tens of MiB of them."""
    return sum(int(_DIGITS[np.searchsorted(_DIGITS_FROM, column, side="right")].sum()) for column in table.T)


class _Writer:
    """Opcodes as `pickle_writer.dumps` writes them for the same records: names and globals are spelled once and referred to."""

    def __init__(self) -> None:
        self.known: dict[str | Global, bytes] = {}

    def parts(self, tensors: Mapping[str, ChunkedTensor], objects: Archives, *, most: int | None = None) -> Iterator[bytes]:
        """The pickle from its first byte to its last; of each tensor with at most so many chunks."""
        at, (names, locations, files) = self.name, objects
        yield pickle.PROTO + b"\x02" + at(Global(_METADATA, "Metadata")) + _BARE + _DICT
        yield at("state_dict_metadata") + _DICT
        for key, tensor in tensors.items():
            yield from self._tensor(key, tensor, most)
        for key in names:
            yield self.object(key)
        yield pickle.SETITEMS + at("planner_data") + pickle.NONE + at("storage_data") + _DICT
        for key, tensor in tensors.items():
            dims = len(tensor.shape)
            for numbers in _rows(tensor, most):
                yield self.location(key, numbers[:dims], tensor.files[numbers[-4]], numbers[-3], numbers[-2])
        for key, (file, offset, length) in zip(names, locations.tolist(), strict=True):
            yield self.location(key, None, files[int(file)], offset, length)
        yield pickle.SETITEMS + at("storage_meta") + pickle.NONE + at("version") + at("1.0.0") + _END + pickle.STOP

    def chunk(self, starts: Sequence[int], sizes: Sequence[int]) -> bytes:
        """A chunk of a tensor: where it starts, and its sizes."""
        at = self.name
        start = at(_CHUNK) + _BARE + _DICT + at("offsets") + self._size(starts)
        return start + at("sizes") + self._size(sizes) + _END

    def object(self, key: str) -> bytes:
        return self.name(key) + self.name(_BYTES) + _BARE + _DICT + _END

    def location(self, key: str, starts: Sequence[int] | None, file: str, offset: int, length: int) -> bytes:
        """Where the chunk of a tensor that starts there, or an object, lies."""
        at = self.name
        index = at(_INDEX) + _BARE + _DICT + at("fqn") + at(key) + at("offset")
        index += (pickle.NONE if starts is None else self._size(starts)) + at("index") + pickle.NONE + _END
        info = at(_INFO) + _BARE + _DICT + at("relative_path") + at(file)
        return index + info + at("offset") + _number(offset) + at("length") + _number(length) + _END

    def name(self, value: str | Global) -> bytes:
        """A text or a global: written out the first time, later referred to."""
        reference = self.known.get(value)
        if reference is None:
            number = struct.pack("<I", len(self.known))
            self.known[value] = pickle.LONG_BINGET + number
            return _spelled(value) + pickle.LONG_BINPUT + number
        return reference

    def _tensor(self, key: str, tensor: ChunkedTensor, most: int | None) -> Iterator[bytes]:
        at, dims = self.name, len(tensor.shape)
        start = at(key) + at(_TENSOR) + _BARE + _DICT + at("properties") + self._properties(names_of(tensor.dtype))
        yield start + at("size") + self._size(tensor.shape) + at("chunks") + pickle.EMPTY_LIST + pickle.MARK
        for numbers in _rows(tensor, most):
            yield self.chunk(numbers[:dims], numbers[dims : 2 * dims])
        yield pickle.APPENDS + _END

    def _properties(self, dtype: Dtype) -> bytes:
        at = self.name
        made = at(_PROPERTIES) + _BARE + pickle.MARK + at(Global("torch", dtype.torch))
        made += (
            at(Global("torch.serialization", "_get_layout")) + pickle.MARK + at("torch.strided") + pickle.TUPLE + pickle.REDUCE
        )
        made += pickle.NEWFALSE + at(Global(_METADATA, "_MEM_FORMAT_ENCODING")) + pickle.MARK + _number(0)
        return made + pickle.TUPLE + pickle.REDUCE + pickle.NEWFALSE + pickle.TUPLE + pickle.BUILD

    def _size(self, sizes: Sequence[int]) -> bytes:
        return self.name(_SIZE) + _SIZE_START + _numbers(sizes) + _SIZE_END


def _rows(tensor: ChunkedTensor, most: int | None) -> Iterator[list[int]]:
    """The numbers of a tensor's chunks, some thousand at a time."""
    table = tensor.table()[:most]
    for start in range(0, len(table), _AT_ONCE):
        yield from table[start : start + _AT_ONCE].tolist()


def _spelled(value: str | Global) -> bytes:
    if isinstance(value, Global):
        return pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
    text = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(text)) + text


@lru_cache(1 << 12)
def _number(value: int) -> bytes:
    if value < 256:
        return pickle.BININT1 + bytes([value])
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _numbers(values: Iterable[int]) -> bytes:
    return b"".join(map(_number, values))
