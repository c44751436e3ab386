"""Read and write the archive of `torch.save` without torch.

It is an uncompressed zip: `archive/data.pkl` describes the tensors, `archive/data/0`, `/1`, … hold raw bytes, aligned to 64 by
an `FB` extra field. Writing yields the bytes before and after the data, so that data of known size can be written at any time;
optional records, and the data's checksum, which torch does not verify, are omitted.
Layout: PKWARE's APPNOTE 6.3 (zip, zip64) and torch's `caffe2/serialize/inline_container.cc`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple, cast

import numpy as np

from formats.dtypes import BY_NAME, CONVERTED
from formats.errors import UserError
from formats.folder import Folder
from formats.pickle_writer import dumps
from formats.pickles import Global, Record, Storage, loads
from formats.spec import DTYPES, Array, Shape, Span, dtype_name, is_valid_shape

ALIGNMENT = 64
"""torch's alignment of a record's data, in bytes."""

DATA_ALIGNMENT = 4096
"""Our alignment of a tensor's data, in bytes. It determines the files' bytes, hence it is the same on every machine."""

_ZIP64_FROM = 0xFFFFFFFF
_MANY = 0xFFFF
"""From so many records on their number is in the zip64 directory."""

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<IIQI")
_MAX_DIRECTORY = 1 << 24  # a tensor's archive has a handful of records; an object's some thousands
_MAX_WRAPPINGS, _MOST_NESTED = 8, 64
_EPOCH_DATE = 0x21  # 1980-01-01, the earliest date in a zip: outputs must not depend on the time

_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_TYPED = Global("torch._utils", "_rebuild_tensor_v3")
_REBUILDS = (_REBUILD, _REBUILD_TYPED)
_HOOKS = Record(Global("collections", "OrderedDict"))

DTYPE_OF = {dtype.torch: DTYPES[dtype.name] for dtype in CONVERTED}
"""The dtypes that a tensor can name, by torch's names."""

_DTYPE_OF_STORAGE = {dtype.storage: DTYPES[dtype.name] for dtype in CONVERTED if dtype.storage}


class Frame(NamedTuple):
    """The bytes of an archive before and after one data record of `size` bytes."""

    before: bytes
    size: int
    after: bytes

    @property
    def length(self) -> int:
        return len(self.before) + self.size + len(self.after)


class StoredTensor(NamedTuple):
    """A tensor in an archive: dtype, shape, strides, the key of its record and its start in it; strides and start in elements."""

    dtype: np.dtype[Any]
    shape: Shape
    strides: Shape
    key: str
    start: int


def tensor_frame(dtype: str, shape: Shape) -> Frame:
    """Return the archive of one contiguous tensor, without its data.

    The data starts at offset `DATA_ALIGNMENT`. If the archive starts at a multiple of it, the data can be read and written past
    the page cache, or mapped.
    """
    record = tensor_record(dtype, shape, key="0")
    size = prod(shape) * DTYPES[dtype].itemsize
    return _frame(dumps(record), size)


def object_archive(value: Any, *, name: str = "archive") -> bytes:
    """Return the complete archive of plain data in which numpy arrays stand for tensors."""
    payloads: list[Array] = []

    def convert(item: Any) -> Any:
        if isinstance(item, np.ndarray):
            payloads.append(array := cast("Array", item))
            return tensor_record(dtype_name(array.dtype), array.shape, key=str(len(payloads) - 1))
        return item

    archive = _Archive(name)
    archive.add("data.pkl", dumps(_mapped(value, convert)))
    archive.add("byteorder", b"little")
    for number, payload in enumerate(payloads):
        archive.add(f"data/{number}", payload.tobytes())
    archive.add("version", b"3\n")
    return archive.finish()


def _mapped(value: Any, change: Callable[[Any], Any], *, depth: int = 0) -> Any:
    """Return dictionaries and lists with what is in them changed. Raises UserError where they are in one another without end."""
    if depth > _MOST_NESTED:
        raise UserError("an object is nested too deeply", hint="what it was read from is damaged")
    if isinstance(value, dict):
        return {key: _mapped(part, change, depth=depth + 1) for key, part in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list):
        return [_mapped(part, change, depth=depth + 1) for part in cast("list[Any]", value)]
    return change(value)


def archive_spans(value: Any, sizes: Sequence[int]) -> Iterator[Span]:
    """Yield the bytes of an archive of plain data from its first to its last: those known now, and gaps of `sizes` bytes for the
    data of the tensors that `tensor_record` describes with the keys 0, 1, … Gaps start at multiples of `DATA_ALIGNMENT`."""
    archive = _Archive("archive")
    archive.add("data.pkl", dumps(value))
    archive.add("byteorder", b"little")
    ends = [archive.skip(f"data/{number}", size, alignment=DATA_ALIGNMENT) for number, size in enumerate(sizes)]
    archive.add("version", b"3\n")
    known, start, at = archive.finish(), 0, 0
    for end, size in zip(ends, sizes, strict=True):
        yield Span(at, known[start:end])
        at += end - start
        yield Span(at, None, size)
        at, start = at + size, end
    yield Span(at, known[start:])


def tensor_record(dtype: str, shape: Shape, *, key: str) -> Record:
    """Return the record of a contiguous tensor in `data.pkl`."""
    count, strides = prod(shape), contiguous_strides(shape)
    names = BY_NAME[dtype]
    if names.storage:
        return _REBUILD(Storage(Global("torch", names.storage), key, count), 0, shape, strides, False, _HOOKS)
    untyped = Storage(Global("torch.storage", "UntypedStorage"), key, count * DTYPES[dtype].itemsize)
    return _REBUILD_TYPED(untyped, 0, shape, strides, False, _HOOKS, Global("torch", names.torch))


def contiguous_strides(shape: Shape) -> Shape:
    """Return the strides of C order, in elements."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _frame(described: bytes, size: int) -> Frame:
    archive = _Archive("archive")
    archive.add("data.pkl", described)
    archive.add("byteorder", b"little")
    before = archive.skip("data/0", size, alignment=DATA_ALIGNMENT)
    archive.add("version", b"3\n")
    whole = archive.finish()
    return Frame(whole[:before], size, whole[before:])


class _Archive:
    """A zip being laid out; `skip` reserves space for data that is written separately."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._out = bytearray()
        self._skipped = 0
        self._entries: list[tuple[bytes, int, int, int]] = []

    def add(self, record: str, data: bytes) -> None:
        self._header(record, len(data), zlib.crc32(data))
        self._out += data

    def skip(self, record: str, size: int, *, alignment: int) -> int:
        """Reserve `size` bytes for a record; return how many bytes of the layout precede them."""
        self._header(record, size, 0, alignment)
        self._skipped += size
        return len(self._out)

    def _header(self, record: str, size: int, checksum: int, alignment: int = ALIGNMENT) -> None:
        at, name = len(self._out) + self._skipped, f"{self._name}/{record}".encode()
        zip64 = struct.pack("<HHQQ", 1, 16, size, size) if size >= _ZIP64_FROM else b""
        padding = -(at + _LOCAL.size + len(name) + len(zip64) + 4) % alignment
        extra = zip64 + struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB", as torch pads
        short = min(size, _ZIP64_FROM)
        version = 45 if zip64 else 0
        header = _LOCAL.pack(0x04034B50, version, 0, 0, 0, _EPOCH_DATE, checksum, short, short, len(name), len(extra))
        self._out += header + name + extra
        self._entries.append((name, size, at, checksum))

    def finish(self) -> bytes:
        start = len(self._out) + self._skipped
        directory = b"".join(_central(*entry) for entry in self._entries)
        count, size = len(self._entries), len(directory)
        self._out += directory
        if start + size >= _ZIP64_FROM or count >= _MANY:
            self._out += _END64.pack(0x06064B50, 44, 45, 45, 0, 0, count, count, size, start)
            self._out += _LOCATOR64.pack(0x07064B50, 0, start + size, 1)
        short = min(count, _MANY)
        self._out += _END.pack(0x06054B50, 0, 0, short, short, size, min(start, _ZIP64_FROM), 0)
        return bytes(self._out)


def _central(name: bytes, size: int, at: int, checksum: int) -> bytes:
    wide = [value for value in (size, size, at) if value >= _ZIP64_FROM]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, at = min(size, _ZIP64_FROM), min(at, _ZIP64_FROM)
    version = 45 if wide else 0
    fields = (0x02014B50, 0, version, 0, 0, 0, _EPOCH_DATE, checksum, size, size, len(name), len(extra), 0, 0, 0, 0, at)
    return _CENTRAL.pack(*fields) + name + extra


class Entry(NamedTuple):
    """One record of an archive: the offset of its local header, and its size."""

    header: int
    size: int


class OpenArchive:
    """An archive inside a file, read through its directory at the end: records in any order, with or without data descriptors.

    `fetch(offset, length)` reads bytes relative to the archive's start; `length` is the archive's.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], length: int, *, source: str) -> None:
        self._fetch, self._length, self._source = fetch, length, source
        self._entries = self._directory()

    @classmethod
    def of(cls, folder: Folder, file: str) -> OpenArchive:
        """Open a small archive that is a file of its own. The file is read whole."""
        data = folder.get(file)
        return cls(lambda at, size: data[at : at + size], len(data), source=file)

    @classmethod
    def in_place(cls, folder: Folder, file: str) -> OpenArchive:
        """Open an archive that is a file of its own, of which only what is asked for is read."""

        def fetch(offset: int, length: int) -> bytes:
            data = bytearray(length)
            folder.read_into(file, offset, memoryview(data))
            return bytes(data)

        return cls(fetch, folder.size(file), source=file)

    def fetch(self, offset: int, length: int) -> bytes:
        """Return some of the archive's bytes, of a tensor's for example."""
        return self._span(offset, length)

    def data(self) -> bytes:
        """Return the archive's bytes."""
        return self._fetch(0, self._length)

    def pickle(self) -> Any:
        return loads(self.record("data.pkl", limit=1 << 26), source=self._source)

    def record(self, name: str, *, limit: int = 1 << 30) -> bytes:
        """Return a record's bytes; UserError for more than `limit`."""
        offset, size = self.locate(name)
        if size > limit:
            raise self._damaged(f"record `{name}` claims {size} bytes")
        return self._fetch(offset, size)

    def locate(self, name: str) -> tuple[int, int]:
        """Return offset and length of a record's bytes in the archive."""
        if name not in self._entries:
            raise self._damaged(f"it has no record `{name}`")
        entry = self._entries[name]
        fields = _LOCAL.unpack(self._span(entry.header, _LOCAL.size))
        if fields[0] != 0x04034B50:
            raise self._damaged(f"record `{name}` has no header where the directory says")
        offset = entry.header + _LOCAL.size + fields[9] + fields[10]
        if offset + entry.size > self._length:
            raise self._damaged(f"record `{name}` runs past the archive's end")
        return offset, entry.size

    def tensor(self, record: Any) -> tuple[StoredTensor, int]:
        """Return a tensor that `data.pkl` describes, and the offset of its elements in the archive."""
        stored = self._described(record)
        offset, size = self.locate(f"data/{stored.key}")
        if (stored.start + prod(stored.shape)) * stored.dtype.itemsize > size:
            raise self._damaged(f"a tensor of shape {list(stored.shape)} needs more than the {size} bytes of its record")
        return stored, offset + stored.start * stored.dtype.itemsize

    def array(self, record: Any) -> Array:
        """Return a small tensor's values."""
        stored, offset = self.tensor(record)
        data = self._fetch(offset, prod(stored.shape) * stored.dtype.itemsize)
        return np.frombuffer(data, stored.dtype).reshape(stored.shape)

    def resolved(self, value: Any) -> Any:
        """Return a part of the pickle with its tensors, which must be small, as arrays: what `object_archive` writes again."""
        return _mapped(value, lambda part: self.array(part) if isinstance(part, Record) and part.kind in _REBUILDS else part)

    def _described(self, record: Any) -> StoredTensor:
        match _unwrapped(record):
            case Record(kind=kind, args=(Storage() as storage, int(start), shape, strides, _, _, *rest)) if kind in _REBUILDS:
                typed = rest[0].name if kind == _REBUILD_TYPED and rest and isinstance(rest[0], Global) else ""
                dtype = DTYPE_OF.get(typed) or _DTYPE_OF_STORAGE.get(storage.kind.name)
                shape, strides = read_sizes(shape), read_sizes(strides)
                if dtype is None or start < 0 or len(shape) != len(strides):
                    raise self._damaged(f"it describes an impossible tensor of `{storage.kind.name}`")
                return StoredTensor(dtype, shape, strides, storage.key, start)
            case _:
                raise self._damaged("it does not describe a tensor")

    def _directory(self) -> dict[str, Entry]:
        start, size, count = self._directory_span()
        directory = self._span(start, size)
        entries: dict[str, Entry] = {}
        at = 0
        for _ in range(count):
            if at + _CENTRAL.size > size:
                raise self._damaged("its directory is cut off")
            name, entry, at = self._entry(directory, at)
            entries[name] = entry
        return entries

    def _entry(self, directory: bytes, at: int) -> tuple[str, Entry, int]:
        fields = _CENTRAL.unpack_from(directory, at)
        stored, size, name_size, extra_size, comment, header = (fields[i] for i in (8, 9, 10, 11, 12, 16))
        at += _CENTRAL.size
        name = directory[at : at + name_size].decode(errors="replace").partition("/")[2]
        extra = directory[at + name_size : at + name_size + extra_size]
        if fields[0] != 0x02014B50 or fields[4] != 0:
            raise self._damaged(f"record `{name}` is compressed, or its directory entry is invalid")
        wide = _zip64(extra)
        size, stored, header = (
            next(wide, 0) if value == _ZIP64_FROM else value for value in (size, stored, header)
        )  # order as in the extra field
        return name, Entry(header, size), at + name_size + extra_size + comment

    def _directory_span(self) -> tuple[int, int, int]:
        """The directory's start, its size and its number of entries."""
        at = self._length - _END.size
        end = _END.unpack(self._span(at, _END.size))
        if end[0] != 0x06054B50:
            raise self._damaged("it does not end as a zip archive does")
        count, size, start = end[4], end[5], end[6]
        if _ZIP64_FROM in (size, start) or count == _MANY:
            locator = _LOCATOR64.unpack(self._span(at - _LOCATOR64.size, _LOCATOR64.size))
            wide = _END64.unpack(self._span(locator[2], _END64.size))
            if locator[0] != 0x07064B50 or wide[0] != 0x06064B50:
                raise self._damaged("its zip64 directory is missing")
            count, size, start = wide[7], wide[8], wide[9]
        if size > _MAX_DIRECTORY or count * _CENTRAL.size > size or start + size > at:
            raise self._damaged(f"its directory claims {count} records in {size} bytes")
        return start, size, count

    def _span(self, start: int, size: int) -> bytes:
        if start < 0 or size < 0 or start + size > self._length:
            raise self._damaged("it points outside itself")
        return self._fetch(start, size)

    def _damaged(self, what: str) -> UserError:
        return UserError(f"`{self._source}` is not a valid torch archive: {what}", hint="the file is damaged")


def _unwrapped(record: Any) -> Any:
    """Return the record of the tensor inside a parameter or a tensor subclass; None for deeper nesting than torch writes."""
    for _ in range(_MAX_WRAPPINGS):
        match record:
            case Record(kind=Global(name="_rebuild_parameter"), args=(Record() as inner, *_)):
                record = inner
            case Record(kind=Global(name="_rebuild_from_type_v2"), args=(Global() as kind, _, (*args,), *_)):
                record = Record(kind, tuple(args))
            case _:
                return record
    return None


def _zip64(extra: bytes) -> Any:
    """Yield the 64-bit values of a zip64 extra field, in their fixed order."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            yield from (value for (value,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + size // 8 * 8]))
            return
        at += 4 + size


def read_sizes(value: Any) -> Shape:
    """Return a shape from a pickle: a tuple, or torch.Size of one. Raises UserError for anything else."""
    inner = value.args[0] if isinstance(value, Record) and value.args else value
    parts = cast("Sequence[Any]", inner) if isinstance(inner, (tuple, list)) else ()
    if not isinstance(inner, (tuple, list)) or not is_valid_shape(parts):
        raise UserError("a shape is not made of whole numbers that a tensor can have")
    return tuple(parts)
