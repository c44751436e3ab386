"""Read pickles as inert records without running code. formats/pickle_writer.py writes pickles from the same records.

A checkpoint's pickles name Python classes, those of a fork of Megatron-LM its own. The reader neither imports nor calls any of
them: a class becomes a `Record` of the arguments that the pickle passes to it. Names of the standard library are refused, except
those of data classes, because no checkpoint needs others. Neither torch nor megatron-core is needed.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from formats.errors import UserError, printable
from formats.faults import fault
from formats.pickle_names import is_known, may_run


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a pickle: a class, function or constant of a module. Calling it only creates a record."""

    module: str
    name: str

    def __call__(self, *args: Any) -> Record:
        return Record(self, args)


@dataclass(slots=True, eq=False)
class Record:
    """An object of a pickle that was not built: `kind(*args)` and its state; of a dict subclass without state, its items."""

    kind: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    made_by_call: bool = True
    """Was it pickled by REDUCE (a call) rather than NEWOBJ (a bare instance)?"""

    def __getitem__(self, name: str) -> Any:
        """Return a field of the state, which is a dict or a pair of which the second is one."""
        return self.fields[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields.get(name, default)

    @property
    def fields(self) -> Mapping[str, Any]:
        """The fields of the state; empty if it has none."""
        state = self.state
        match state:
            case (_, dict()):
                return cast("dict[str, Any]", state[1])
            case _:
                return cast("dict[str, Any]", state) if isinstance(state, dict) else {}


@dataclass(frozen=True, slots=True)
class Storage:
    """A persistent id of torch: the storage class, the key of its record, and its number of elements."""

    kind: Global
    key: str
    count: int


def _dict(*pairs: Any) -> dict[Any, Any]:
    return {_hashable(key): value for key, value in (pairs[0] if pairs else ())}


def _set(items: Any = ()) -> set[Any]:
    return {_hashable(item) for item in items}


_PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "set"): _set,
    ("builtins", "frozenset"): _set,
    ("__builtin__", "set"): _set,
    ("__builtin__", "frozenset"): _set,
    ("collections", "OrderedDict"): _dict,
}
"""Built-in containers, which are built as they are: they run no code of the file."""

_BASE = cast("Any", pickle)._Unpickler
"""The unpickler written in Python: its memo is a dict, so a forged index cannot make it allocate gigabytes as the C one
does, and its table of opcodes can be cut down."""

_REFUSED = {
    pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.PERSID, pickle.BYTEARRAY8, pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER, pickle.DUP, pickle.NEWOBJ_EX,
}  # fmt: skip


class Unpickler(_BASE):
    """An unpickler of the opcodes that checkpoints need, on inert records."""

    dispatch: ClassVar = {code: act for code, act in _BASE.dispatch.items() if bytes([code]) not in _REFUSED}

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)
        super().__init__(self._stream)  # pyright: ignore[reportUnknownMemberType]
        self._room = len(data)

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if may_run(module, name):
            raise UserError(
                f"the pickle names `{printable(f'{module}.{name}'[:100])}`, which no checkpoint needs; it was not executed",
                hint="the file does not come from megatron-core or torch, or someone tampered with it",
            )
        return Global(module, name)

    def persistent_load(self, pid: Any, /) -> Storage:
        match pid:
            case ("storage", Global() as kind, str(key), str(), int(count)):
                return Storage(kind, key, count)
            case _:
                raise UserError("the pickle refers to something that is not a tensor's storage")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _items_of(self.stack[-1])[_hashable(key)] = value

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _items_of(self.stack[-1]).update(_dict(zip(items[::2], items[1::2], strict=True)))

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_dict(zip(items[::2], items[1::2], strict=True)))

    dispatch[pickle.DICT[0]] = load_dict

    def load_append(self) -> None:
        item = self.stack.pop()
        self._extend([item])

    dispatch[pickle.APPEND[0]] = load_append

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._extend(items)

    dispatch[pickle.APPENDS[0]] = load_appends

    def _extend(self, items: list[Any]) -> None:
        """Extend a list; items of other classes are dropped."""
        if not isinstance(self.stack[-1], Record):
            self.stack[-1].extend(items)

    def load_additems(self) -> None:
        items = _set(self.pop_mark())
        if not isinstance(self.stack[-1], Record):
            self.stack[-1].update(items)

    dispatch[pickle.ADDITEMS[0]] = load_additems

    def load_frozenset(self) -> None:
        items = self.pop_mark()  # first: it changes what `append` appends to
        self.append(_set(items))

    dispatch[pickle.FROZENSET[0]] = load_frozenset

    def load_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        self.append(self._made(kind, args, by_call=False))

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_reduce(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        self.append(self._made(kind, args, by_call=True))

    dispatch[pickle.REDUCE[0]] = load_reduce

    def _made(self, kind: Any, args: Any, *, by_call: bool) -> Any:
        """Return a record or a built-in container.

        The sizes of container arguments are summed against the file's size: a file could turn one list into a new set with three
        bytes, again and again.
        """
        if not isinstance(args, tuple):
            raise UserError("the pickle calls something without a tuple of arguments")
        given = cast("tuple[Any, ...]", args)
        if isinstance(kind, Global):
            return Record(kind, given, made_by_call=by_call)
        if kind not in _PLAIN.values():
            raise UserError("the pickle calls something that is not a class")
        self._room -= sum(len(part) for part in given if hasattr(part, "__len__"))
        if self._room < 0:
            raise UserError("the pickle builds containers that are larger than itself")
        return kind(*given)

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record) and state is not target:  # a dict that is its own `__dict__` repeats its items
            target.state = state

    dispatch[pickle.BUILD[0]] = load_build


class RecordSequence:
    """A sequence of consecutive records, kept in another form by a reader."""


_KEYS = (str, int, float, bytes, type(None), Record, Global, RecordSequence)


def _hashable(key: Any) -> Any:
    """Return a key of a dict or member of a set. Raises UserError for nested tuples, whose hashing can take forever."""
    if isinstance(key, _KEYS) or (isinstance(key, tuple) and all(isinstance(part, _KEYS) for part in cast("tuple[Any]", key))):
        return cast("Any", key)
    raise UserError("a dictionary has keys that no checkpoint needs")


def _items_of(target: Any) -> dict[Any, Any]:
    """Return the dict that items are added to: `target`, or the state of a record."""
    if not isinstance(target, Record):
        return target
    if target.state is None:
        target.state = {}
    return target.state


def loads(data: bytes, *, source: str) -> Any:
    """Load the object in `data`, classes as inert records.

    Raises UserError for a name that could run code and for an invalid pickle; `source` names the file in messages.
    """
    return load_from(Unpickler(data), source)


def load_from(unpickler: Unpickler, source: str) -> Any:
    """Run an unpickler; errors become a UserError that names `source`."""
    try:
        return unpickler.load()
    except UserError as error:
        raise UserError(f"`{source}`: {error.args[0]}", hint=error.hint) from None
    except Exception as error:
        raise UserError(f"`{source}` is not a readable pickle: {fault(error)}", hint="the file is damaged") from error


def others(value: Any) -> set[Global]:
    """Return the names in a loaded object that belong neither to Python nor to torch and megatron-core."""
    seen, todo, unknown = set[int](), [value], set[Global]()
    while todo:
        part = todo.pop()
        if isinstance(part, Global) and not is_known(part.module, part.name):
            unknown.add(part)
        if id(part) not in seen:
            seen.add(id(part))
            todo += _parts(part)
    return unknown


def _parts(value: Any) -> Iterable[Any]:
    match value:
        case Record():
            return value.kind, *value.args, value.state
        case Storage():
            return (value.kind,)
        case dict():
            items = cast("dict[Any, Any]", value)
            return [*items.keys(), *items.values()]
        case list() | tuple() | set():
            return cast("Iterable[Any]", value)
        case _:
            return ()
