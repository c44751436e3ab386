"""Read the pickle of an index with hundreds of thousands of records.

Each kind of record is unpickled once, opcode by opcode, and turned into a pattern (formats/index_patterns.py). Its repetitions
are matched and stored as numbers. Anything else is unpickled like any pickle (formats/pickles.py). Memory holds the numbers;
objects for all records would take ten times the file's size.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np

from formats.arrays import distinct
from formats.errors import UserError
from formats.index_patterns import Pattern, pattern_of
from formats.pickles import Global, Record, RecordSequence, Unpickler, load_from
from formats.spec import Array
from formats.torch_zip import read_sizes

_CHUNK, _INDEX, _INFO = "ChunkStorageMetadata", "MetadataIndex", "_StorageInfo"
_OBJECT = "BytesStorageMetadata"
_SKIPPED = "WriteItem"
"""megatron-core stores the save plans of all ranks in the index. They are skipped."""

_KINDS = {_CHUNK, _INDEX, _INFO, _OBJECT, _SKIPPED}
_MOST_PATTERNS = 64
_MEMOIZE = pickle.MEMOIZE[0]


@dataclass(slots=True, eq=False)
class ChunkRun(RecordSequence):
    """Consecutive chunks in a list: offsets and sizes of each, [count, 2 * dims]."""

    table: Array


@dataclass(slots=True, eq=False)
class LocationRun(RecordSequence):
    """Consecutive archives in the index: the numbers in `texts` of the tensor or object `names` and of the `files`, the chunks'
    `offsets` [count, dims] (None for objects), and `spans` [count, 2], offset and length in the file."""

    names: Array
    files: Array
    offsets: Array | None
    spans: Array
    texts: Mapping[int, str]


ELSEWHERE = RecordSequence()
"""Placeholder for (parts of) records that were stored as numbers or skipped, where something refers to them."""

OBJECT = RecordSequence()
"""Placeholder for the record of an object, which has no content."""


class IndexUnpickler(Unpickler):
    """The unpickler described above. Without `patterns`, everything is read opcode by opcode."""

    dispatch: ClassVar = {
        code: act for code, act in Unpickler.dispatch.items() if bytes([code]) not in (pickle.POP, pickle.POP_MARK)
    }

    def __init__(self, data: bytes, *, patterns: bool = True) -> None:
        super().__init__(data)
        self._data = data
        self._use_patterns = patterns
        self._patterns: dict[int, list[Pattern]] = {}
        self._pairs: dict[int, list[Pattern]] = {}
        self._before: tuple[int, Pattern] | None = None
        self._memoized = 0
        self._put = False
        self._open: list[tuple[str, int, int]] = []
        self.used_patterns = False
        """Were patterns used? Reading may fail with patterns where a record is changed or referred to later."""

    def load_frame(self) -> None:
        """Skip a frame's length: frames matter only for streams."""
        if int.from_bytes(self.read(8), "little") > len(self._data):
            raise UserError("a frame is longer than the file")

    dispatch[pickle.FRAME[0]] = load_frame

    def load_put(self) -> None:
        self._put_by(cast("Any", super()).load_put)

    dispatch[pickle.PUT[0]] = load_put

    def load_binput(self) -> None:
        self._put_by(cast("Any", super()).load_binput)

    dispatch[pickle.BINPUT[0]] = load_binput

    def load_long_binput(self) -> None:
        self._put_by(cast("Any", super()).load_long_binput)

    dispatch[pickle.LONG_BINPUT[0]] = load_long_binput

    def _put_by(self, put: Callable[[], None]) -> None:
        """Memoize under a number. Patterns refer to numbers, so they are disabled once a number is reused."""
        known = len(self.memo)
        put()
        self._put = True
        self._use_patterns &= len(self.memo) > known and not self._memoized

    def load_memoize(self) -> None:
        """Memoize under the next number. The count is ours: the memo has no entries for records stored as numbers."""
        if self._put:
            raise UserError("it memoizes in two ways")
        self.memo[self._memoized] = self.stack[-1]
        self._memoized += 1

    dispatch[_MEMOIZE] = load_memoize

    def load_binget(self) -> None:
        self._get(self.read(1)[0], 2)

    dispatch[pickle.BINGET[0]] = load_binget

    def load_long_binget(self) -> None:
        self._get(int.from_bytes(self.read(4), "little"), 5)

    dispatch[pickle.LONG_BINGET[0]] = load_long_binget

    def _get(self, number: int, length: int) -> None:
        if number not in self.memo:
            if number < self._memoized:
                return self.append(ELSEWHERE)
            raise UserError(f"it refers to memo {number}, which does not exist")
        value = self.memo[number]
        if self._use_patterns and type(value) is Global and value.name in _KINDS:
            start = self._stream.tell() - length
            if self._matched(start):
                return None
            self._open.append((value.name, number, start))
        return self.append(value)

    def load_build(self) -> None:
        if isinstance(self.stack[-2], RecordSequence):
            raise UserError("it changes a record after building it")
        super().load_build()
        target: Any = self.stack[-1]
        if self._open and isinstance(target, Record) and target.kind.name == self._open[-1][0]:
            _, number, start = self._open.pop()
            self._learn(number, self._data[start : self._stream.tell()], target)

    dispatch[pickle.BUILD[0]] = load_build

    def _learn(self, number: int, data: bytes, record: Record) -> None:
        """Keep the pattern of a record if it reproduces the record's values; for archives, joined to the name's pattern."""
        kind, known = record.kind.name, self._patterns.setdefault(number, [])
        made = pattern_of(data, self.memo) if len(known) < _MOST_PATTERNS else None
        if kind == _OBJECT:
            if made and not made.refers:
                self._objects(data, made.memoized)
            return
        if made is None or not made.refers or not (kind == _SKIPPED or self._holds(made, data, record)):
            self._before = None
            return
        if all(made.source != pattern.source for pattern in known):
            known.append(made)
        if kind == _INFO and self._before:
            pairs = self._pairs.setdefault(self._before[0], [])
            both = self._before[1].then(made)
            if len(pairs) < _MOST_PATTERNS and all(both.source != pattern.source for pattern in pairs):
                pairs.append(both)
        self._before = (number, made) if kind == _INDEX else None

    def _holds(self, made: Pattern, data: bytes, record: Record) -> bool:
        table, _, _ = made.table(data, 0, self.memo)
        if len(table) != 1:
            return False
        values = [self.memo[value] if refers else value for value, refers in zip(table[0].tolist(), made.refers, strict=True)]
        return {key: tuple(values[part]) for key, part in made.fields.items()} == _expected(record)

    def _matched(self, start: int) -> bool:
        """Consume all records from `start` on that patterns match; return whether there was any."""
        kind: Any = self.memo[self._number_at(start)].name
        if kind == _CHUNK:
            end = self._chunks(start)
        elif kind == _INDEX and len(self.stack) % 2 == 0:
            end = self._locations(start)
        else:
            end = self._skipped(start) if kind == _SKIPPED else start
        if end > start:
            self.used_patterns = True
            self._stream.seek(end)
        return end > start

    def _chunks(self, at: int) -> int:
        pattern, table, end = self._longest(at, self._patterns.get(self._number_at(at), ()))
        if pattern:
            offsets, sizes = (pattern.fields[key] for key in ("offsets", "sizes"))
            self.append(ChunkRun(np.concatenate([table[:, offsets], table[:, sizes]], axis=1)))
        return end

    def _locations(self, at: int) -> int:
        pattern, table, end = self._longest(at, self._pairs.get(self._number_at(at), ()))
        if pattern:
            fields = pattern.fields
            names, files = (table[:, fields[key].start] for key in ("fqn", "then relative_path"))
            spans = np.stack([table[:, fields[f"then {key}"].start] for key in ("offset", "length")], axis=1)
            texts = {number: self.memo[number] for number in distinct(np.stack([names, files]))}
            run = LocationRun(names, files, table[:, fields["offset"]] if "offset" in fields else None, spans, texts)
            self.append(run)
            self.append(run)
        return end

    def _skipped(self, at: int) -> int:
        before, patterns = at, self._patterns.get(self._number_at(at), ())
        while applied := next(((p, match) for p in patterns if (match := p.single.match(self._data, at))), None):
            self._memoized += applied[0].memoized
            at = applied[1].end()
        if at > before:
            self.append(ELSEWHERE)
        return at

    def _objects(self, record: bytes, memoized: int) -> None:
        """Consume further objects: a new name each, followed by the identical record."""
        before = self._stream.tell()
        while entry := self._named(self._stream.tell()):
            name, number, end = entry
            if not self._data.startswith(record, end):
                break
            self.memo[number] = name
            self._memoized += 0 if self._put else 1 + memoized
            self.append(name)
            self.append(OBJECT)
            self._stream.seek(end + len(record))
        self.used_patterns |= self._stream.tell() > before

    def _named(self, at: int) -> tuple[str, int, int] | None:
        """Return the text at a position, its new memo number and the end position; None if there is no new text."""
        data, count = self._data, _LENGTHS.get(self._data[at], 0)
        start = at + 1 + count
        stop = start + int.from_bytes(data[at + 1 : start], "little")
        put = data[stop : stop + 1]
        size = _PUTS.get(put, -1)
        end = stop + 1 + size
        number = int.from_bytes(data[stop + 1 : end], "little") if size else self._memoized
        if not count or size < 0 or number in self.memo or (self._put if put == pickle.MEMOIZE else self._memoized):
            return None
        try:
            return str(data[start:stop], "utf-8", "surrogatepass"), number, end
        except UnicodeDecodeError:
            return None

    def _longest(self, at: int, patterns: Sequence[Pattern]) -> tuple[Pattern | None, Array, int]:
        """Return the first pattern that matches at a position, the values of all records it matches, and their end.

        After an impossible record, patterns are disabled: each would scan thousands of records for every single one.
        """
        for pattern in patterns:
            table, end, is_bad = pattern.table(self._data, at, self.memo)
            self._use_patterns &= not is_bad
            if len(table):
                self._memoized += pattern.memoized * len(table)
                return pattern, table, end
        return None, np.empty((0, 0), np.int64), at

    def _number_at(self, at: int) -> int:
        """Return the memo number that the opcode at a position refers to; -1 for other opcodes."""
        code = self._data[at : at + 1]
        if code == pickle.BINGET:
            return self._data[at + 1]
        return int.from_bytes(self._data[at + 1 : at + 5], "little") if code == pickle.LONG_BINGET else -1


_LENGTHS = {pickle.SHORT_BINUNICODE[0]: 1, pickle.BINUNICODE[0]: 4}
"""Bytes of the length of a text, by opcode."""

_PUTS = {pickle.MEMOIZE: 0, pickle.BINPUT: 1, pickle.LONG_BINPUT: 4}
"""Bytes of the memo number, by opcode."""


def _expected(record: Record) -> dict[str, tuple[Any, ...]] | None:
    """Return the values that a record's pattern should give, by key; None for records that no pattern covers."""
    try:
        if record.kind.name == _CHUNK:
            return {"offsets": read_sizes(record["offsets"]), "sizes": read_sizes(record["sizes"])}
        if record.kind.name == _INFO:
            if record.get("transform_descriptors"):
                return None
            return {name: (record[name],) for name in ("relative_path", "offset", "length")}
        offset, number = record.get("offset"), record.get("index")
        shape = {} if offset is None else {"offset": read_sizes(offset)}
        return {"fqn": (record["fqn"],), **shape, **({} if number is None else {"index": (number,)})}
    except (KeyError, UserError):
        return None


def load_index[T](data: bytes, build: Callable[[Any], T], *, source: str) -> T:
    """Return `build` of the pickled object, in which runs of chunks and archives are `ChunkRun` and `LocationRun`.

    If that fails, read again without patterns: a record may refer to another in a way that numbers cannot express.
    """
    unpickler = IndexUnpickler(data)
    try:
        return build(load_from(unpickler, source))
    except UserError:
        if not unpickler.used_patterns:
            raise
    return build(load_from(IndexUnpickler(data, patterns=False), source))
