"""JSON objects from files that may be damaged."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, cast

from formats.errors import UserError
from formats.folder import Folder


def parse_json(text: bytes, *, source: str) -> dict[str, Any]:
    """A JSON object; UserError names `source` where it is broken, is no object, or says a thing twice."""
    try:
        parsed = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"`{source}` is not readable JSON: {error}", hint="the file is damaged") from None
    if not isinstance(parsed, dict):
        raise UserError(f"`{source}` should be a JSON object, it is a {type(parsed).__name__}")
    return cast("dict[str, Any]", parsed)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"`{twice}` stands there twice")
    return found


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON object from a file; UserError names the file where it is missing or broken."""
    if not folder.has(name):
        raise UserError(f"`{folder.label}` has no `{name}`", hint="point at a Hugging Face model directory")
    return parse_json(folder.get(name), source=name)
