"""Python's C unpickler as an oracle: classes become stubs that keep what the pickle gave them."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from formats.pickles import Global, Record, Storage

_REAL = {
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)},
    ("collections", "OrderedDict"): dict,
}


class Stub:
    """An instance of any class: its arguments and its state."""

    def __new__(cls, *arguments: Any) -> Stub:
        made = object.__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class Persistent:
    """A persistent id."""

    pid: Any


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._made: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REAL:
            return _REAL[module, name]
        return self._made.setdefault((module, name), type(name, (Stub,), {"__module__": module}))

    def persistent_load(self, pid: Any) -> Any:
        return Persistent(pid)


def stubbed(data: bytes) -> tuple[Any] | None:
    """What the C unpickler makes of a pickle; None where it refuses, or would take memory for a far memo."""
    try:
        for code, argument, _ in pickletools.genops(data):
            if code.name in ("PUT", "LONG_BINPUT") and int(argument) > 1 << 16:
                return None
        return (_Unpickler(data).load(),)
    except Exception:
        return None


def plain(value: Any, depth: int = 12) -> Any:
    """A value in one spelling for both unpicklers, as deep as is worth comparing."""
    if depth == 0:
        return "…"
    opened = _opened(value)
    if opened is not None:
        return [plain(part, depth - 1) for part in opened[:200]]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(plain(item, depth - 1)) for item in value)
    if isinstance(value, int) and abs(value) >= 1 << 200:
        return hash(value)
    return "a container's class" if callable(value) else repr(value)


def _opened(value: Any) -> Sequence[Any] | None:
    """What a value is made of, where it is made of others."""
    match value:
        case Record():
            return "made", value.kind, value.args, value.state
        case Stub():
            return "made", type(value), value.arguments, value.state
        case Storage():
            return "stored", value.kind, value.key, value.count
        case Persistent():
            return "stored", value.pid[1], value.pid[2], value.pid[4]
    return _parts(value)


def _parts(value: Any) -> Sequence[Any] | None:
    if isinstance(value, Global):
        return "class", value.module, value.name
    if isinstance(value, type) and issubclass(value, Stub):
        return "class", value.__module__, value.__name__
    if isinstance(value, dict):
        return ["dict", *value.items()]
    return [type(value).__name__, *value] if isinstance(value, (list, tuple)) else None
