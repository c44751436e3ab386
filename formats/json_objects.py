"""JSON objects from files that may be damaged, and values fit to be written as JSON."""

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
_HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


class _TwiceError(ValueError):
    """A key that stands in one object twice."""


def parse_json(text: bytes, *, source: str) -> dict[str, Any]:
    """A JSON object; UserError names `source` where it is broken, is no object, or says a thing twice."""
    try:
        parsed = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except _TwiceError as error:
        raise UserError(f"`{source}` is not readable JSON: `{error.args[0]}` stands there twice", hint=_DAMAGED) from None
    except (ValueError, RecursionError) as error:
        refuse_start(text, source=source)
        raise UserError(f"`{source}` is not readable JSON: {fault(error)}", hint=_DAMAGED) from error
    if not isinstance(parsed, dict):
        raise UserError(f"`{source}` should be a JSON object, it is a {type(parsed).__name__}")
    _check_depth(parsed, source)
    if _HALF_A_PAIR.search(text):
        _check_text(parsed, source)
    return cast("dict[str, Any]", parsed)


def _check_text(parsed: Any, source: str) -> None:
    """Half a surrogate pair is no text: it could be read, but neither printed nor written."""
    try:
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"`{source}` is not readable JSON: {fault(error)}", hint=_DAMAGED) from error


def _check_depth(parsed: Any, source: str) -> None:
    """What is nested deeper than any document of ours could be read but not printed."""
    level: list[Any] = [parsed]
    for _ in range(_DEEPEST - 1):
        parts = (part.values() if hasattr(part, "values") else part for part in level)
        level = [inner for part in parts for inner in part if type(inner) in _CONTAINERS]
        if not level:
            return
    raise UserError(f"`{source}` is nested deeper than {_DEEPEST} levels", hint=_DAMAGED)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _TwiceError(twice)
    return found


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON object from a file; UserError names the file where it is missing or broken."""
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
