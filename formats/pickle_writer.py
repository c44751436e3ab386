"""Write pickles from plain data and the records that formats/pickles.py reads them as."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any

from formats.errors import UserError
from formats.faults import fault
from formats.pickles import Global, Record, Storage


def dumps(value: Any) -> bytes:
    """Pickle plain values, `Record`s, `Global`s and `Storage`s (protocol 2, which torch's safe loader reads).

    Raises UserError for anything else, and for what refers to itself: a damaged pickle may hold both.
    """
    writer = _Pickler()
    try:
        writer.write(value)
    except RecursionError as error:
        raise UserError(f"an object cannot be written again: {fault(error)}", hint="what it was read from is damaged") from None
    return writer.finish()


class _Pickler:
    """Writes opcodes for plain data and records. Strings and globals are memoized, so each is written once."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._memo: dict[str | Global, int] = {}
        self._put(pickle.PROTO, b"\x02")

    def finish(self) -> bytes:
        self._put(pickle.STOP)
        return self._out.getvalue()

    def _put(self, *parts: bytes) -> None:
        for part in parts:
            self._out.write(part)

    def write(self, value: Any) -> None:
        writer = _WRITERS.get(type(value))  # pyright: ignore[reportUnknownArgumentType]
        if writer is None:
            raise UserError(f"a checkpoint holds no `{type(value).__name__}`", hint="what it was read from is damaged")
        writer(self, value)

    def put_constant(self, value: bool | None) -> None:
        self._put({None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value])

    def put_integer(self, value: int) -> None:
        if 0 <= value < 256:
            self._put(pickle.BININT1, bytes([value]))
        elif -(1 << 31) <= value < 1 << 31:
            self._put(pickle.BININT, struct.pack("<i", value))
        else:
            encoded = pickle.encode_long(value)
            self._put(pickle.LONG1, bytes([len(encoded)]), encoded)

    def put_float(self, value: float) -> None:
        self._put(pickle.BINFLOAT, struct.pack(">d", value))

    def put_string(self, value: str) -> None:
        if not self._recall(value):
            encoded = value.encode()
            self._put(pickle.BINUNICODE, struct.pack("<I", len(encoded)), encoded)
            self._remember(value)

    def put_bytes(self, value: bytes) -> None:
        """Write bytes as Python does in protocol 2, which has no opcode for them."""
        self.put_record(_ENCODE(value.decode("latin1"), "latin1"))

    def put_set(self, value: set[Any]) -> None:
        """Write a set in an order that does not depend on the process."""
        self.put_record(_SET([*sorted(value, key=repr)]))

    def put_global(self, value: Global) -> None:
        if not self._recall(value):
            self._put(pickle.GLOBAL, f"{value.module}\n{value.name}\n".encode())
            self._remember(value)

    def _recall(self, value: str | Global) -> bool:
        if value in self._memo:
            self._put(pickle.LONG_BINGET, struct.pack("<I", self._memo[value]))
        return value in self._memo

    def _remember(self, value: str | Global) -> None:
        self._memo[value] = len(self._memo)
        self._put(pickle.LONG_BINPUT, struct.pack("<I", self._memo[value]))

    def put_tuple(self, value: tuple[Any, ...]) -> None:
        self._put(pickle.MARK)
        for item in value:
            self.write(item)
        self._put(pickle.TUPLE)

    def put_list(self, value: list[Any]) -> None:
        self._put(pickle.EMPTY_LIST, pickle.MARK)
        for item in value:
            self.write(item)
        self._put(pickle.APPENDS)

    def put_dict(self, value: dict[Any, Any]) -> None:
        self._put(pickle.EMPTY_DICT, pickle.MARK)
        for key, item in value.items():
            self.write(key)
            self.write(item)
        self._put(pickle.SETITEMS)

    def put_record(self, value: Record) -> None:
        self.write(value.kind)
        self.write(value.args)
        self._put(pickle.REDUCE if value.made_by_call else pickle.NEWOBJ)
        if value.state is not None:
            self.write(value.state)
            self._put(pickle.BUILD)

    def put_storage(self, value: Storage) -> None:
        self.write(("storage", value.kind, value.key, "cpu", value.count))
        self._put(pickle.BINPERSID)


_ENCODE, _SET = Global("_codecs", "encode"), Global("builtins", "set")

_WRITERS: dict[type, Callable[..., None]] = {
    type(None): _Pickler.put_constant,
    bool: _Pickler.put_constant,
    int: _Pickler.put_integer,
    float: _Pickler.put_float,
    str: _Pickler.put_string,
    bytes: _Pickler.put_bytes,
    set: _Pickler.put_set,
    tuple: _Pickler.put_tuple,
    list: _Pickler.put_list,
    dict: _Pickler.put_dict,
    Global: _Pickler.put_global,
    Record: _Pickler.put_record,
    Storage: _Pickler.put_storage,
}
