"""How text files begin, and what that says of them: byte-order marks, compression, and JSON that is not one value per line.

Knows bytes alone. What a line means is its reader's to know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

from formats.errors import UserError

UTF8_MARK = b"\xef\xbb\xbf"
_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
"""Byte-order marks; the longer ones first."""

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"), b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"), b"PK\x03\x04": ("zip", "unzip"),
}  # fmt: skip
_SHORT = 1 << 16


def check_encoding(path: Path, head: bytes) -> None:
    """UserError where a file that begins with `head` is compressed, or text in another encoding than UTF-8."""
    for magic, (name, program) in _COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(f"`{path}` is compressed with {name}", hint=f"unpack it first: `{program} {path}`")
    if head[:3] == b"BZh" and head[4:10] == b"1AY&SY":
        raise UserError(f"`{path}` is compressed with bzip2", hint=f"unpack it first: `bunzip2 {path}`")
    for mark, name in _ENCODINGS.items():
        if head.startswith(mark):
            raise _other_encoding(path, name, "as its first bytes say")
    pairs = head[:64]
    if len(pairs) >= 4 and (not any(pairs[1::2]) or not any(pairs[::2])):
        raise _other_encoding(path, "UTF-16", "to judge by the zeros in it")


def _other_encoding(path: Path, name: str, why: str) -> UserError:
    return UserError(
        f"`{path}` is text in {name}, {why}; it should be UTF-8", hint=f"convert it: `iconv -f {name} -t UTF-8 {path} > NEW`"
    )


def open_lines(path: Path, *, what: str) -> BinaryIO:
    """A file of JSON values, one per line, open behind the byte-order mark that it may begin with. UserError where it is no
    such file, but one JSON array or an object that takes several lines; `what` is in a line."""
    file = path.open("rb")
    try:
        head = file.read(_SHORT)
        check_encoding(path, head)
        start = len(UTF8_MARK) if head.startswith(UTF8_MARK) else 0
        _check_values(path, head[start:], what=what)
        file.seek(start)
    except BaseException:
        file.close()
        raise
    return file


def _check_values(path: Path, head: bytes, *, what: str) -> None:
    text = head.lstrip()
    first, ended, rest = text.partition(b"\n")
    if text[:1] == b"[" and not _is_a_list_of_plain_values(first):
        raise UserError(
            f"`{path}` is one JSON array; a .jsonl file has one {what} per line",
            hint=f"write it so: `jq -c '.[]' {path} > NEW.jsonl`",
        )
    if text[:1] == b"{" and ended and rest.lstrip()[:1] not in (b"{", b"") and _is_cut_short(first):
        raise UserError(
            f"`{path}` begins with a JSON object that takes several lines; a .jsonl file has one {what} per line",
            hint=f"write it so: `jq -c . {path} > NEW.jsonl`",
        )


def _is_a_list_of_plain_values(line: bytes) -> bool:
    """A line that is a list by itself is a bad line in a file of lines, whose number is worth telling."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, list) and not any(isinstance(one, (dict, list)) for one in found) and bool(found)


def _is_cut_short(line: bytes) -> bool:
    """Does what the line begins go on in the next one? Its braces are not closed, and no text in it is left open."""
    depth, quoted, escaped = 0, False, False
    for letter in line.decode(errors="replace"):
        if quoted:
            quoted, escaped = (letter != '"' or escaped), letter == "\\" and not escaped
        elif letter == '"':
            quoted = True
        else:
            depth += (letter in "{[") - (letter in "}]")
    return depth > 0 and not quoted and line.rstrip()[-1:] in (b"{", b"[", b",", b":")
