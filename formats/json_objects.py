"""Parse JSON objects from files that may be damaged, and prepare values for writing as JSON."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, cast

from formats.content import refuse_start
from formats.errors import UserError
from formats.faults import fault
from formats.folder import Folder

_DEEPEST = 64
_CONTAINERS = frozenset({dict, list})
_DAMAGED = "the file is damaged"
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _DuplicateKeyError(ValueError):
    """An object has the same key twice."""


def parse_json(text: bytes, *, source: str) -> dict[str, Any]:
    """Parse a JSON object. Raises UserError that names `source` for invalid JSON, another type or a duplicate key."""
    try:
        parsed = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except _DuplicateKeyError as error:
        raise UserError(f"`{source}` is not readable JSON: duplicate key `{error.args[0]}`", hint=_DAMAGED) from None
    except (ValueError, RecursionError) as error:
        refuse_start(text, source=source)
        raise UserError(f"`{source}` is not readable JSON: {fault(error)}", hint=_DAMAGED) from error
    if not isinstance(parsed, dict):
        raise UserError(f"`{source}` should be a JSON object, it is a {type(parsed).__name__}")
    _check_depth(parsed, source)
    if _LONE_SURROGATE.search(text):
        _check_text(parsed, source)
    return cast("dict[str, Any]", parsed)


def _check_text(parsed: Any, source: str) -> None:
    """Reject lone surrogates: json can parse them, but they cannot be encoded as UTF-8."""
    try:
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"`{source}` is not readable JSON: {fault(error)}", hint=_DAMAGED) from error


def _check_depth(parsed: Any, source: str) -> None:
    """Reject deeper nesting than any real document has: json could parse it, but not print it."""
    level: list[Any] = [parsed]
    for _ in range(_DEEPEST - 1):
        parts = (part.values() if hasattr(part, "values") else part for part in level)
        level = [inner for part in parts for inner in part if type(inner) in _CONTAINERS]
        if not level:
            return
    raise UserError(f"`{source}` is nested deeper than {_DEEPEST} levels", hint=_DAMAGED)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        raise _DuplicateKeyError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return parsed


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """Read a JSON object from a file. Raises UserError where the file is missing or invalid."""
    if not folder.has(name):
        raise UserError(f"`{folder.label}` has no `{name}`", hint="point at a Hugging Face model directory")
    return parse_json(folder.get(name), source=name)


def finite(value: Any) -> Any:
    """Return `value` with floats that JSON has no number for as the strings `NaN`, `Infinity` and `-Infinity`.

    >>> finite({"largest": float("inf"), "values": (0.5, float("nan"))})
    {'largest': 'Infinity', 'values': [0.5, 'NaN']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in cast("dict[str, Any]", value).items()}
    return [finite(inner) for inner in cast("list[Any]", value)] if isinstance(value, (list, tuple)) else value
