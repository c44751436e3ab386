"""Pickles without code: a reader that builds inert records, and a writer of the same records.

A checkpoint's pickles name Python classes. Reading here imports none and calls none: a class on the allow-list becomes a
`Record` that holds what the pickle passed to it, any other name is refused. Writing takes the same records. So this
module needs neither torch nor megatron-core, and nothing in a file can run.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from formats.errors import UserError
from formats.faults import fault


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a pickle: a class, a function or a constant of some module. Calling it makes a record, nothing else."""

    module: str
    name: str

    def __call__(self, *args: Any) -> Record:
        return Record(self, args)


@dataclass(slots=True, eq=False)
class Record:
    """What a pickle wanted to build: `kind(*args)`, then its state."""

    kind: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    made_by_call: bool = True
    """REDUCE (a function or class called) rather than NEWOBJ (a bare instance)."""

    def __getitem__(self, name: str) -> Any:
        """A field of the state, whether it was pickled as a dict or as a pair of dicts."""
        return self._fields()[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields().get(name, default)

    def _fields(self) -> Mapping[str, Any]:
        state = self.state
        match state:
            case (_, dict()):
                return cast("dict[str, Any]", state[1])
            case _:
                return cast("dict[str, Any]", state) if isinstance(state, dict) else {}


@dataclass(frozen=True, slots=True)
class Storage:
    """A persistent id of torch's: the dtype's storage class, the record's key, and how many elements it holds."""

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
"""Built-in containers, made for real: nothing they do can surprise."""

_CHECKPOINT = "torch.distributed.checkpoint"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALLOWED: Mapping[str, frozenset[str]] = {
    f"{_CHECKPOINT}.metadata": _words(
        "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties MetadataIndex"
        " StorageMeta _MEM_FORMAT_ENCODING"
    ),
    f"{_CHECKPOINT}.filesystem": frozenset(["_StorageInfo", "_StoragePrefix", "_StorageWriterTransforms"]),
    f"{_CHECKPOINT}.planner": _words(
        "SavePlan LoadPlan WriteItem ReadItem WriteItemType LoadItemType TensorWriteData BytesIOWriteData"
    ),
    f"{_CHECKPOINT}._extension": frozenset(["ZStandard"]),
    "megatron.core.dist_checkpointing.strategies.torch": frozenset(["MCoreMetadata", "MCoreSavePlan", "MCoreSavePlanner"]),
    "torch": _words(
        "Size Tensor device bfloat16 float16 float32 float64 float8_e4m3fn float8_e5m2 int8 int16 int32 int64 uint8 bool"
        " uint16 uint32 uint64 complex64 complex128 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
        " BFloat16Storage HalfStorage FloatStorage DoubleStorage CharStorage ShortStorage IntStorage LongStorage"
        " ByteStorage BoolStorage Float8_e4m3fnStorage Float8_e5m2Storage"
    ),
    "torch._C": frozenset(["Generator"]),
    "torch.serialization": frozenset(["_get_layout"]),
    "torch.storage": frozenset(["UntypedStorage", "_load_from_bytes"]),
    "torch._utils": frozenset(["_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"]),
    "torch._tensor": frozenset(["_rebuild_from_type_v2"]),
    "argparse": frozenset(["Namespace"]),
    "types": frozenset(["SimpleNamespace"]),
    "pathlib": frozenset(["Path", "PosixPath", "PurePosixPath"]),
    "pathlib._local": frozenset(["Path", "PosixPath", "PurePosixPath"]),
    "signal": frozenset(["Signals"]),
    "_io": frozenset(["BytesIO"]),
    "io": frozenset(["BytesIO"]),
    "_codecs": frozenset(["encode"]),
    "numpy": frozenset(["ndarray", "dtype"]),
    "numpy.dtypes": frozenset(["UInt32DType"]),
    "numpy.core.multiarray": frozenset(["_reconstruct", "scalar"]),
    "numpy._core.multiarray": frozenset(["_reconstruct", "scalar"]),
    "megatron.core.enums": frozenset(["ModelType"]),
    "megatron.core.optimizer.optimizer_config": frozenset(["OptimizerConfig"]),
    "megatron.core.optimizer": frozenset(["OptimizerConfig"]),
    "megatron.core.rerun_state_machine": frozenset(["RerunDiagnostic", "RerunMode", "RerunState"]),
    "megatron.core.transformer.enums": frozenset(["AttnBackend", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope"]),
    "transformer_engine.common.recipe": _words(
        "DelayedScaling Float8CurrentScaling Float8BlockScaling MXFP8BlockScaling NVFP4BlockScaling Format"
        " _FormatHelper MMParams QParams"
    ),
    "megatron.core.extensions.transformer_engine": frozenset(["TEDelayedScaling"]),
}
"""The classes a checkpoint may name: what `.metadata` holds (planner classes too) and what `megatron.core.safe_globals`
lists. Each becomes an inert record."""


_BASE = cast("Any", pickle)._Unpickler
"""The unpickler written in Python: its memo is a dict, so a forged index cannot make it allocate gigabytes as the C one
does, and its table of opcodes can be cut down."""

_REFUSED = {
    pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.PERSID, pickle.BYTEARRAY8, pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER, pickle.DUP, pickle.NEWOBJ_EX,
}  # fmt: skip


class Unpickler(_BASE):
    """Opcodes that checkpoints need, and what they do to inert records."""

    dispatch: ClassVar = {code: act for code, act in _BASE.dispatch.items() if bytes([code]) not in _REFUSED}

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)
        super().__init__(self._stream)  # pyright: ignore[reportUnknownMemberType]
        self._room = len(data)

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if name not in ALLOWED.get(module, ()):
            raise UserError(
                f"the pickle names `{module}.{name}`, which no checkpoint needs; it was not executed",
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
        self.stack[-1][_hashable(key)] = value

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(_dict(zip(items[::2], items[1::2], strict=True)))

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_dict(zip(items[::2], items[1::2], strict=True)))

    dispatch[pickle.DICT[0]] = load_dict

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(_set(items))

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
        """A record, or a built-in container for real. What containers are made of is counted: one list, made into sets again
        and again at three bytes each, would fill any memory."""
        if not isinstance(args, tuple):
            raise UserError("the pickle calls something without a tuple of arguments")
        given = cast("tuple[Any, ...]", args)
        if isinstance(kind, Global):
            return Record(kind, given, made_by_call=by_call)
        if kind not in _PLAIN.values():
            raise UserError("the pickle calls something that is not a class")
        self._room -= sum(len(part) for part in given if hasattr(part, "__len__"))
        if self._room < 0:
            raise UserError("the pickle makes containers of more than it holds")
        return kind(*given)

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state

    dispatch[pickle.BUILD[0]] = load_build


class Run:
    """Records that follow one another, kept together by a reader that needs them in another form."""


_KEYS = (str, int, float, bytes, type(None), Record, Global, Run)


def _hashable(key: Any) -> Any:
    """A key of a dict or a member of a set. Tuples within tuples are refused: hashing them can take forever."""
    if isinstance(key, _KEYS) or (isinstance(key, tuple) and all(isinstance(part, _KEYS) for part in cast("tuple[Any]", key))):
        return cast("Any", key)
    raise UserError("a dictionary has keys that no checkpoint needs")


def loads(data: bytes, *, source: str) -> Any:
    """The object in `data`, classes as inert records.

    Raises UserError for a class outside `ALLOWED` and for bytes that are no pickle; `source` names the file in it.
    """
    return load_from(Unpickler(data), source)


def load_from(unpickler: Unpickler, source: str) -> Any:
    """What an unpickler loads, or a UserError that names `source`."""
    try:
        return unpickler.load()
    except UserError as error:
        raise UserError(f"`{source}`: {error.args[0]}", hint=error.hint) from None
    except Exception as error:
        raise UserError(f"`{source}` is not a readable pickle: {fault(error)}", hint="the file is damaged") from error


def dumps(value: Any) -> bytes:
    """Pickle plain values, `Record`s, `Global`s and `Storage`s (protocol 2, which torch's safe loader reads)."""
    writer = _Pickler()
    writer.write(value)
    return writer.finish()


class _Pickler:
    """Opcodes for plain data and records. Strings and globals are remembered, so a name is written once."""

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
            raise TypeError(f"cannot pickle {type(value)}")
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


_WRITERS: dict[type, Callable[..., None]] = {
    type(None): _Pickler.put_constant,
    bool: _Pickler.put_constant,
    int: _Pickler.put_integer,
    float: _Pickler.put_float,
    str: _Pickler.put_string,
    tuple: _Pickler.put_tuple,
    list: _Pickler.put_list,
    dict: _Pickler.put_dict,
    Global: _Pickler.put_global,
    Record: _Pickler.put_record,
    Storage: _Pickler.put_storage,
}
