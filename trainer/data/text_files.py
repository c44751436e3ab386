"""Check the first bytes of text files: byte-order marks, compression, and JSON that is not one value per line.

What a line means is for the caller.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

from formats.errors import UserError

UTF8_BOM = b"\xef\xbb\xbf"
_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
"""Encodings by byte-order mark; longer marks first."""

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"), b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"), b"PK\x03\x04": ("zip", "unzip"),
}  # fmt: skip
_SHORT = 1 << 16


def check_encoding(path: Path, head: bytes) -> None:
    """Raise UserError if a file that begins with `head` is compressed or in another encoding than UTF-8."""
    for magic, (name, program) in _COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(f"`{path}` is compressed with {name}", hint=f"unpack it first: `{program} {path}`")
    if head[:3] == b"BZh" and head[4:10] == b"1AY&SY":
        raise UserError(f"`{path}` is compressed with bzip2", hint=f"unpack it first: `bunzip2 {path}`")
    for mark, name in _ENCODINGS.items():
        if head.startswith(mark):
            raise _other_encoding(path, name, "by its byte-order mark")
    pairs = head[:64]
    if len(pairs) >= 4 and (not any(pairs[1::2]) or not any(pairs[::2])):
        raise _other_encoding(path, "UTF-16", "judging by its zero bytes")


def _other_encoding(path: Path, name: str, why: str) -> UserError:
    return UserError(
        f"`{path}` is text in {name}, {why}; it should be UTF-8", hint=f"convert it: `iconv -f {name} -t UTF-8 {path} > NEW`"
    )


def open_lines(path: Path, *, what: str) -> BinaryIO:
    """Open a file of JSON values, one per line, and skip a byte-order mark. Raises UserError if it is one JSON array or begins
    with
    an object over several lines. `what` names the value of a line in messages."""
    file = path.open("rb")
    try:
        head = file.read(_SHORT)
        check_encoding(path, head)
        start = len(UTF8_BOM) if head.startswith(UTF8_BOM) else 0
        _check_values(path, head[start:], what=what)
        file.seek(start)
    except BaseException:
        file.close()
        raise
    return file


def _check_values(path: Path, head: bytes, *, what: str) -> None:
    text = head.lstrip()
    first, ended, following_lines = text.partition(b"\n")
    if text[:1] == b"[" and not _is_list_of_scalars(first):
        raise UserError(
            f"`{path}` is one JSON array; a .jsonl file has one {what} per line",
            hint=f"write it so: `jq -c '.[]' {path} > NEW.jsonl`",
        )
    if text[:1] == b"{" and ended and following_lines.lstrip()[:1] not in (b"{", b"") and _continues_on_next_line(first):
        raise UserError(
            f"`{path}` begins with a JSON object over several lines; a .jsonl file has one {what} per line",
            hint=f"write it so: `jq -c . {path} > NEW.jsonl`",
        )


def _is_list_of_scalars(line: bytes) -> bool:
    """Return whether a line is a list without objects or lists: a bad line in a file of lines, reported later with its number."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and not any(isinstance(member, (dict, list)) for member in value) and bool(value)


def _continues_on_next_line(line: bytes) -> bool:
    """Return whether the line's JSON value goes on in the next line: brackets are open, and no string is."""
    depth, quoted, escaped = 0, False, False
    for letter in line.decode(errors="replace"):
        if quoted:
            quoted, escaped = (letter != '"' or escaped), letter == "\\" and not escaped
        elif letter == '"':
            quoted = True
        else:
            depth += (letter in "{[") - (letter in "}]")
    return depth > 0 and not quoted and line.rstrip()[-1:] in (b"{", b"[", b",", b":")
