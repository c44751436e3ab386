"""Patterns of records that repeat in a pickle: a record's opcodes, with a group for each integer and each memo reference.

A match therefore has the same meaning as the opcodes with these values.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from formats.arrays import distinct
from formats.pickles import Global
from formats.spec import Array, is_size

_KEYS = {"offsets", "sizes", "fqn", "offset", "index", "relative_path", "length", "transform_descriptors"}
_BLOCK = 2000  # records that are matched at a time
_FEW = 8  # records: matching them as a block takes as long as one by one
_MOST = 1 << 62  # as `is_size`
_MEMOIZE = pickle.MEMOIZE[0]

_WIDE = b"|".join(rb"\x8a%c.{%d}" % (count, count) for count in range(1, 9))
_INTEGER = rb"(K.|M..|J....|" + _WIDE + rb")"
_REFERENCE = rb"(h.|j....)"
_ARGUMENTS = {pickle.BININT1[0]: 1, pickle.BININT2[0]: 2, pickle.BININT[0]: 4, pickle.BINGET[0]: 1, pickle.LONG_BINGET[0]: 4}
_PLAIN = frozenset(b"".join([
    pickle.MARK, pickle.TUPLE, pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_DICT, pickle.SETITEM,
    pickle.SETITEMS, pickle.NEWOBJ, pickle.BUILD, pickle.REDUCE, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.MEMOIZE,
]))  # fmt: skip


@dataclass(slots=True)
class Pattern:
    """The opcodes of one record or of a pair: `source` has a group for each value, `fields` the groups of each key, `refers`
    says which groups are references."""

    source: bytes
    memoized: int
    fields: dict[str, slice]
    refers: tuple[bool, ...]
    single: re.Pattern[bytes] = field(init=False)
    many: re.Pattern[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.single = re.compile(self.source, re.DOTALL)
        groupless = self.source.replace(_INTEGER, b"(?:" + _INTEGER[1:]).replace(_REFERENCE, b"(?:" + _REFERENCE[1:])
        self.many = re.compile(b"(?:%b){1,%d}" % (groupless, _BLOCK), re.DOTALL)

    def then(self, other: Pattern) -> Pattern:
        """Return the pattern of both, one after the other; keys of the second are prefixed with `then `."""
        count = len(self.refers)
        moved = {f"then {key}": slice(part.start + count, part.stop + count) for key, part in other.fields.items()}
        both = self.fields | moved
        return Pattern(self.source + other.source, self.memoized + other.memoized, both, self.refers + other.refers)

    def table(self, data: bytes, at: int, memo: Mapping[int, Any]) -> tuple[Array, int, bool]:
        """Match records from `at` on.

        Returns their values [records, groups], references as memo numbers; the end position; and whether it stopped before an
        impossible record.
        """
        table, end = self._alike(data, at)
        if len(table) < _FEW:
            table, end = self._others(data, at)
        if not len(table):
            return table, at, False
        good = (table >= 0).all(axis=1) & (table < _MOST).all(axis=1)
        for number in np.flatnonzero(self.refers):
            targets = distinct(table[:, number])
            named = np.array([isinstance(memo.get(target), str) for target in targets])
            good &= named[np.searchsorted(targets, table[:, number])]
        if good.all():
            return table, end, False
        count = int(np.flatnonzero(~good)[0])
        for _ in range(count):
            at = self.single.match(data, at).end()  # pyright: ignore[reportOptionalMemberAccess] - it did
        return table[:count], at, True

    def _alike(self, data: bytes, at: int) -> tuple[Array, int]:
        """Match records with the same opcodes as the first: each value has a fixed column of bytes. Return values and end."""
        first = self.single.match(data, at)
        if first is None:
            return np.empty((0, len(self.refers)), np.int64), at
        length = first.end() - at
        records = np.frombuffer(data, np.uint8, min(_BLOCK, (len(data) - at) // length) * length, at).reshape(-1, length)
        spans = [(start - at + (2 if data[start] == pickle.LONG1[0] else 1), stop - at) for start, stop in first.regs[1:]]
        fixed = np.ones(length, bool)
        for start, stop in spans:
            fixed[start:stop] = False
        other = np.flatnonzero((records[:, fixed] != records[0, fixed]).any(axis=1))
        records = records[: other[0] if len(other) else None]
        return np.stack([_columns(records[:, start:stop]) for start, stop in spans], axis=1), at + records.size

    def _others(self, data: bytes, at: int) -> tuple[Array, int]:
        """Match records with any opcodes for their values; return values and end."""
        block = self.many.match(data, at)
        if block is None:
            return np.empty((0, len(self.refers)), np.int64), at
        rows = self.single.findall(data, at, block.end())
        rows = [(value,) for value in rows] if len(self.refers) == 1 else rows
        return np.stack([_decoded(column) for column in zip(*rows, strict=True)], axis=1), block.end()


def _columns(stored: Array) -> Array:
    """Decode little-endian numbers, [count, width] bytes. Those of more than 2 bytes are signed; negative ones give -1."""
    width = stored.shape[1]
    raw = np.zeros((len(stored), 8), np.uint8)
    raw[:, :width] = stored
    values = raw.view("<i8")[:, 0]
    if width > 2:
        values[stored[:, -1] >= 1 << 7] = -1
    return values


def _decoded(column: Sequence[bytes]) -> Array:
    """Decode the numbers that opcodes push or refer to; -1 for impossible sizes."""
    lengths = np.fromiter(map(len, column), np.int64, len(column))
    stream = np.frombuffer(b"".join(column) + bytes(16), np.uint8)
    starts = np.cumsum(lengths) - lengths
    codes = stream[starts]
    values = stream[starts + 1].astype(np.int64)
    for code, count in ((pickle.BININT2[0], 2), (pickle.BININT[0], 4), (pickle.LONG_BINGET[0], 4)):
        chosen = np.flatnonzero(codes == code)
        if len(chosen):
            positions = starts[chosen, np.newaxis] + 1 + np.arange(count)
            raw = np.zeros((len(chosen), 4), np.uint8)
            raw[:, :count] = stream[positions]
            values[chosen] = raw.view("<i4")[:, 0]
    for number in np.flatnonzero(codes == pickle.LONG1[0]).tolist():
        value = int.from_bytes(column[number][2:], "little", signed=True)
        values[number] = value if is_size(value) else -1
    return values


_POPS = {
    pickle.TUPLE1[0]: 1, pickle.TUPLE2[0]: 2, pickle.TUPLE3[0]: 3, pickle.NEWOBJ[0]: 2, pickle.REDUCE[0]: 2, pickle.BUILD[0]: 2,
    pickle.SETITEM[0]: 3,
}  # fmt: skip
_TO_MARK = {pickle.TUPLE[0], pickle.SETITEMS[0]}
_CHANGES = {pickle.SETITEM[0], pickle.SETITEMS[0], pickle.BUILD[0]}
_REFERENCES = {pickle.BINGET[0], pickle.LONG_BINGET[0]}


def _is_one_object(codes: Iterable[int]) -> bool:
    """Do opcodes push exactly one object, without using the earlier stack and without changing objects created before?"""
    made, marks = list[bool](), list[int]()  # for each object on the stack: was it created here, or only referred to?
    for code in codes:
        if code == pickle.MARK[0]:
            marks.append(len(made))
            continue
        if code == _MEMOIZE:
            continue
        if code in _TO_MARK and not marks:
            return False
        taken = len(made) - marks.pop() if code in _TO_MARK else _POPS.get(code, 0)
        taken += code == pickle.SETITEMS[0]
        left = len(made) - taken
        if left < (marks[-1] if marks else 0) or (code in _CHANGES and not made[left]):
            return False
        made[left:] = [code not in _REFERENCES]
    return len(made) == 1 and not marks


def pattern_of(data: bytes, memo: dict[int, Any]) -> Pattern | None:
    """Return the pattern of a record's opcodes; None if it has opcodes that repeating records do not have."""
    parts: list[bytes] = []
    codes: list[int] = []
    fields: dict[str, slice] = {}
    refers: list[bool] = []
    memoized = at = 0
    key = ""
    while at < len(data):
        code, start = data[at], at
        codes.append(code)
        at += 1 + (1 + data[at + 1] if code == pickle.LONG1[0] else _ARGUMENTS.get(code, 0))
        if code in _PLAIN:
            parts.append(re.escape(data[start:at]))
            memoized += code == _MEMOIZE
            continue
        is_reference = code in _REFERENCES
        if not is_reference and code not in _ARGUMENTS and code != pickle.LONG1[0]:
            return None
        target = memo.get(int.from_bytes(data[start + 1 : at], "little")) if is_reference else None
        if isinstance(target, Global) or (isinstance(target, str) and target in _KEYS):
            parts.append(re.escape(data[start:at]))
            key = target if isinstance(target, str) else key
            continue
        fields[key] = slice(fields[key].start if key in fields else len(refers), len(refers) + 1)
        refers.append(is_reference)
        parts.append(_REFERENCE if is_reference else _INTEGER)
    return Pattern(b"".join(parts), memoized, fields, tuple(refers)) if _is_one_object(codes) else None
