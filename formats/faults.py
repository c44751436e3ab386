"""Describe an exception of a library in our own words.

Libraries change the wording of their errors from release to release. Our messages use the attributes of an exception (line,
column, byte, error number, package) and its class, never its text. The exception itself is chained for debugging.
"""

from __future__ import annotations

import json
import re
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

_TEXT_BY_CLASS: tuple[tuple[type[BaseException], str], ...] = (
    (RecursionError, "it is nested too deeply"),
    (UnicodeEncodeError, "it holds half a surrogate pair, which is not a character"),
    (MemoryError, "there is not enough memory for it"),
    (TimeoutError, "there was no answer in time"),
)


def fault(error: BaseException) -> str:
    """Return a description of `error` for the end of a message, such as `the fault is at line 2, column 5`."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not {error.encoding.upper()}"
    if isinstance(error, ImportError):
        return missing_package(error)
    for kind, text in _TEXT_BY_CLASS:
        if isinstance(error, kind):
            return text
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    where = position(error)
    return f"the fault is at {where}" if where else f"`{type(error).__name__}`"


def position(error: BaseException) -> str:
    """Return the position at which json, yaml, jinja2 or re stopped in a text; empty where the error has none."""
    mark: Any = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}"
    if mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}"
    if isinstance(error, re.error) and error.pos is not None:
        return f"character {error.pos + 1}"
    line, at = getattr(error, "lineno", None), getattr(error, "position", None)
    if isinstance(line, int):
        return f"line {line}"
    return f"character {at + 1}" if isinstance(at, int) else ""


def missing_package(error: ImportError) -> str:
    """Return which package could not be imported."""
    package = (error.name or "").partition(".")[0]
    if not package:
        return "a package that it needs cannot be imported"
    return f"the package `{package}` {'is not installed' if isinstance(error, ModuleNotFoundError) else 'cannot be imported'}"


def code_location(trace: TracebackType | traceback.StackSummary | None) -> str:
    """Return the line of code that an exception came from, as `torch/serialization.py, line 12`; empty without a traceback."""
    frames = traceback.extract_tb(trace) if isinstance(trace, TracebackType) else list(trace or ())
    if not frames:
        return ""
    _, installed, below = frames[-1].filename.rpartition("site-packages/")
    return f"`{below if installed else Path(frames[-1].filename).name}`, line {frames[-1].lineno}"
