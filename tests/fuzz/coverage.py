"""Which branches of the readers have been taken: an input that takes a new one is worth damaging further."""

from __future__ import annotations

import pickle
import sys
from types import CodeType, FunctionType, ModuleType
from typing import Any

_TOOL = 4
_PACKAGES = ("formats", "converter")


class Coverage:
    """`grew()` says whether code since the last call took a branch that was never taken before.

    An event is switched off once both its ways are known, so that watching costs next to nothing after a while.
    """

    def __init__(self) -> None:
        self._taken: dict[tuple[CodeType, int], set[int]] = {}
        self._count = self._told = 0

    @property
    def count(self) -> int:
        return self._count

    def grew(self) -> bool:
        more, self._told = self._count > self._told, self._count
        return more

    def __enter__(self) -> Coverage:
        monitoring = sys.monitoring
        monitoring.use_tool_id(_TOOL, "fuzz")
        monitoring.register_callback(_TOOL, monitoring.events.BRANCH, self._branch)
        for code in _codes():
            monitoring.set_local_events(_TOOL, code, monitoring.events.BRANCH)
        return self

    def __exit__(self, *_error: object) -> None:
        for code in _codes():
            sys.monitoring.set_local_events(_TOOL, code, 0)
        sys.monitoring.free_tool_id(_TOOL)

    def _branch(self, code: CodeType, offset: int, destination: int) -> Any:
        ways = self._taken.setdefault((code, offset), set())
        if destination not in ways:
            ways.add(destination)
            self._count += 1
        return sys.monitoring.DISABLE if len(ways) > 1 else None


def _codes() -> set[CodeType]:
    """The code of every function of the project's modules, and of the unpickler that theirs is made of."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in _PACKAGES]
    codes: set[CodeType] = set()
    for owner in [*modules, vars(pickle)["_Unpickler"], vars(pickle)["_Unframer"]]:
        _collect(owner, codes)
    return codes


def _collect(owner: ModuleType | type, codes: set[CodeType]) -> None:
    for named in list(vars(owner).values()):
        value = getattr(named, "func", None) or getattr(named, "fget", None) or getattr(named, "__wrapped__", named)
        if isinstance(value, FunctionType):
            _nested(value.__code__, codes)
        elif isinstance(value, type) and value.__module__.partition(".")[0] in _PACKAGES and value is not owner:
            _collect(value, codes)


def _nested(code: CodeType, codes: set[CodeType]) -> None:
    codes.add(code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _nested(constant, codes)
