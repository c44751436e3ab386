"""Damage with a sense of structure: bytes, whole numbers in binary, JSON values, opcodes of pickles, fields of zips.

Every mutation takes bytes and a source of chance, and gives other bytes; where the structure it knows is not there any
more, it damages bytes. The same seed gives the same damage.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

NUMBERS = (0, 1, -1, 2, 7, 63, 64, 65, 127, 255, 4096, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 60, (1 << 62) - 1,
           1 << 63, (1 << 64) - 1)  # fmt: skip

VALUES: tuple[Any, ...] = (
    *NUMBERS, None, True, False, "", "a", "..", "../x", "/etc/passwd", "\ud800", "a\0b", "x" * 300, 0.5, -1.5, 1e308,
    float("nan"), float("inf"), 10**4200, -(10**4200), [], {}, [0], [1 << 60, 1 << 60], [0, 1 << 61, 1 << 61], [1] * 65, [[[]]],
    {"a": {"a": []}}, "llama", "mistral", "bfloat16", "linear", "llama3", "F32", "BF16",
    r"((\w|\.)+)+#", r"(.*)*x", "(a|a)*" * 9, r".*(q|v)_proj", "(", ["q_proj"], {r"(\w*)*#": 3}, {"": 3},
)  # fmt: skip

NAMES = (
    b"os\nsystem", b"builtins\neval", b"builtins\nset", b"collections\nOrderedDict", b"torch\nSize", b"torch\nfloat32",
    b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_tensor_v3", b"torch._utils\n_rebuild_parameter",
    b"torch._tensor\n_rebuild_from_type_v2", b"torch\nFloatStorage", b"torch.storage\nUntypedStorage", b"argparse\nNamespace",
    b"torch.distributed.checkpoint.metadata\nBytesStorageMetadata", b"torch.distributed.checkpoint.metadata\nMetadata",
    b"ourcompany.megatron.schedules\nSchedule", b"__main__\nSettings", b"datetime\ntimedelta", b"torch\nos.system",
)  # fmt: skip

SNIPPETS = (
    b"}", b"]", b")", b"N", b"(", b"t", b"0", b"1", b"2", b"R", b"b", b"\x81", b"\x85", b"\x86", b"\x87", b"h\x00", b"q\x00",
    b"s", b"X\x04\x00\x00\x00../x", b"u", b"a", b"e", b"Q", b"\x88", b"K\x05", b"M\xff\xff", b"J\xff\xff\xff\xff",

    b"\x8a\x08" + b"\xff" * 7 + b"\x0f", b"X\x01\x00\x00\x00a", b"r\xff\xff\xff\x7f",
    b"\x8e" + b"\xff" * 7 + b"\x0f", b"\x8f", b"\x90", b"\x91", b"\x94", b".",
    *(b"c" + name + b"\n" for name in NAMES), b"q\x00h\x00\x86" * 40, b"\x85R" * 60, b"\x85" * 900,
)  # fmt: skip

YAML_VALUES = (
    "null", "!!int ''", "2020-01-01", "[a]", "{}", "-1", "0x" + "f" * 5000, ".nan", ".inf", "'..'", "1:30:30", "!!binary aGk=",
    "!!set {a}", "!!python/object/apply:os.system [x]", "*none", "&a [*a]", "[" * 3000, "[" * 3000 + "]" * 3000, "{a: " * 2000,
    "\n    <<: {b: 1}", "true", "abc", "1e400", "silu", "!!str", "? ? ?", "|-", "\t", "[1, 0]", "[true, false]", "&x 1",
    "\n    {}: 1",
)  # fmt: skip


def flip(data: bytes, rng: Random) -> bytes:
    return _put(data, _at(data, rng), lambda old: bytes([old[0] ^ 1 << rng.randrange(8)]), 1)


def set_byte(data: bytes, rng: Random) -> bytes:
    return _put(data, _at(data, rng), lambda _old: bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]), 1)


def truncate(data: bytes, rng: Random) -> bytes:
    return data[: _at(data, rng)]


def delete(data: bytes, rng: Random) -> bytes:
    at = _at(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 8, 64)) :]


def repeat(data: bytes, rng: Random) -> bytes:
    at, size = _at(data, rng), rng.choice((1, 4, 16, 64, 512))
    return data[:at] + data[at : at + size] * rng.choice((2, 2, 3, 50)) + data[at + size :]


def insert(data: bytes, rng: Random) -> bytes:
    at = _at(data, rng)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 32))) + data[at:]


def move(data: bytes, rng: Random) -> bytes:
    """One stretch of the file laid over another."""
    size = rng.choice((1, 4, 16, 256))
    start = _at(data, rng)
    return _put(data, _at(data, rng), lambda _old: data[start : start + size], size)


def number(data: bytes, rng: Random) -> bytes:
    """A whole number in binary, of any width and either order, becomes one that overflows something."""
    code = rng.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(code)
    value = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
    return _put(data, _at(data, rng), lambda _old: struct.pack(code, value), size)


def digits(data: bytes, rng: Random) -> bytes:
    """A number in text becomes another."""
    numbers = list(re.finditer(rb"\d+", data[: 1 << 16]))
    if not numbers:
        return flip(data, rng)
    match = rng.choice(numbers)
    value = rng.choice((*NUMBERS, int(match[0][:18]) + rng.choice((-1, 1, 4, 8))))
    return data[: match.start()] + str(value).encode() + data[match.end() :]


BYTES: tuple[Mutation, ...] = (flip, set_byte, truncate, delete, repeat, insert, move, number, digits)


def any_bytes(data: bytes, rng: Random) -> bytes:
    return rng.choice(BYTES)(data, rng)


def _at(data: bytes, rng: Random) -> int:
    return rng.randrange(len(data)) if data else 0


def _put(data: bytes, at: int, change: Callable[[bytes], bytes], size: int) -> bytes:
    old = data[at : at + size]
    return data[:at] + change(old) + data[at + size :] if len(old) == size else data


def any_json(data: bytes, rng: Random) -> bytes:
    """One value replaced, removed, renamed, exchanged with another, nested deep, or said twice."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return any_bytes(data, rng)
    spots = _spots(document)
    if not spots:
        return any_bytes(data, rng)
    (holder, key), (other, name) = rng.choice(spots), rng.choice(spots)
    act = rng.randrange(6)
    if act == 0:
        return _twice(data, rng)
    if act == 1:
        return _dumped(document).replace(_dumped(holder[key]), b"[" * 1400 + b"]" * 1400, 1)
    if act == 2:
        holder[key], other[name] = other[name], holder[key]
    elif act == 3 and isinstance(holder, dict):
        holder[rng.choice((name, "", "__metadata__", "\ud800", "a.b"))] = holder.pop(key)
    elif act == 4:
        del holder[key]
    else:
        holder[key] = rng.choice(VALUES)
    return _dumped(document)


def _spots(document: Any) -> list[tuple[Any, Any]]:
    """Every holder and key in a document."""
    spots: list[tuple[Any, Any]] = []
    todo = [document]
    while todo and len(spots) < 2000:
        holder = todo.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        spots += [(holder, key) for key in keys]
        todo += [holder[key] for key in keys]
    return spots


def _twice(data: bytes, rng: Random) -> bytes:
    pairs = list(re.finditer(rb'"[^"]*":\s*("[^"]*"|\d+|\{[^{}]*\}|\[[^\[\]]*\])', data))
    if not pairs:
        return flip(data, rng)
    pair = rng.choice(pairs)
    return data[: pair.end()] + b"," + pair[0] + data[pair.end() :]


def _dumped(document: Any) -> bytes:
    try:
        return json.dumps(document, separators=(",", ":")).encode()
    except (ValueError, RecursionError):  # numbers too long for Python to print, or a value put into itself
        return b"1" * 5000


def any_header(data: bytes, rng: Random) -> bytes:
    """A safetensors file: its JSON damaged, with a length that mostly still fits."""
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= size <= len(data) - 8 or rng.random() < 0.2:
        return any_bytes(data, rng)
    text = rng.choice((any_json, any_json, digits, digits, flip))(data[8 : 8 + size], rng)
    length = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS) & ((1 << 64) - 1)
    return struct.pack("<Q", length) + text + data[8 + size :]


@lru_cache(64)
def _opcodes(data: bytes) -> Sequence[tuple[int, int, str]]:
    """Where each opcode of a pickle starts and ends, as far as it can be read."""
    codes: list[tuple[int, str]] = []
    with contextlib.suppress(Exception):
        codes.extend((at or 0, code.name) for code, _, at in pickletools.genops(data))
    ends = [*(at for at, _ in codes[1:]), len(data)][: len(codes)]
    return [(at, end, name) for (at, name), end in zip(codes, ends, strict=True)]


def any_pickle(data: bytes, rng: Random) -> bytes:
    """An opcode removed, repeated, exchanged or put in; a name exchanged; a number made large."""
    codes = _opcodes(data)
    if len(codes) < 3 or rng.random() < 0.15:
        return any_bytes(data, rng)
    start, end, _ = rng.choice(codes)
    other, other_end, _ = rng.choice(codes)
    piece = data[other:other_end]
    put = rng.choice((b"", data[start:end] + piece, piece, rng.choice(SNIPPETS) + data[start:end]))
    return rng.choice((data[:start] + put + data[end:], _renamed(data, rng), _renumbered(data, rng)))


def _renamed(data: bytes, rng: Random) -> bytes:
    """A class becomes another."""
    named = [(start, end) for start, end, name in _opcodes(data) if name == "GLOBAL"]
    start, end = rng.choice(named or [(0, 0)])
    return data[:start] + b"c" + rng.choice(NAMES) + b"\n" + data[end:]


def _renumbered(data: bytes, rng: Random) -> bytes:
    """A whole number in a pickle becomes another."""
    spots = [(a, b) for a, b, name in _opcodes(data) if name in ("BININT", "BININT1", "BININT2", "LONG1")]
    if not spots:
        return flip(data, rng)
    start, end = rng.choice(spots)
    value = rng.choice(
        (*NUMBERS, 10**5000, -(10**5000), int.from_bytes(data[start + 1 : end][:8], "little") + rng.choice((-1, 1, 8)))
    )
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return data[:start] + b"\x8b" + struct.pack("<I", len(raw)) + raw + data[end:]


_FIELDS = {
    b"PK\x03\x04": "<IHHHHHIIIHH",
    b"PK\x01\x02": "<IHHHHHHIIIHHHHHII",
    b"PK\x05\x06": "<IHHHHIIH",
    b"PK\x06\x06": "<IQHHIIQQQQ",
    b"PK\x06\x07": "<IIQI",
}


def zip_field(data: bytes, rng: Random) -> bytes:
    """One field of one structure of a zip."""
    structures = [(m.start(), _FIELDS[m[0]]) for m in re.finditer(rb"PK(\x03\x04|\x01\x02|\x05\x06|\x06\x06|\x06\x07)", data)]
    if not structures:
        return number(data, rng)
    at, layout = rng.choice(structures)
    if at + struct.calcsize(layout) > len(data):
        return truncate(data, rng)
    fields = list(struct.unpack_from(layout, data, at))
    which = rng.randrange(1, len(fields))
    width = 8 * struct.calcsize(f"<{layout[1 + which]}")
    fields[which] = (rng.choice(NUMBERS) if rng.random() < 0.5 else fields[which] + rng.randint(-70, 70)) & ((1 << width) - 1)
    return data[:at] + struct.pack(layout, *fields) + data[at + struct.calcsize(layout) :]


def zipped_pickle(data: bytes, rng: Random) -> bytes:
    """A torch archive packed anew around a damaged `data.pkl`."""
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            for info in old.infolist():
                body = old.read(info)
                named = zipfile.ZipInfo(info.filename)
                new.writestr(named, any_pickle(body, rng) if info.filename.endswith("data.pkl") else body)
    except Exception:
        return zip_field(data, rng)
    return out.getvalue()


def line(data: bytes, rng: Random) -> bytes:
    """A line of YAML: its value replaced, or the line removed, repeated or shifted."""
    lines = data.decode(errors="replace").split("\n")
    at = rng.randrange(len(lines))
    key, colon, _ = lines[at].partition(":")
    act = rng.randrange(6)
    if act < 3 and colon:
        lines[at] = f"{key}: {rng.choice(YAML_VALUES)}"
    elif act == 3:
        lines.insert(at, rng.choice(lines))
    elif act == 4:
        del lines[at]
    else:
        lines[at] = rng.choice((" ", "  ", "- ", "? ", "&a ", "*a ")) + lines[at]
    return "\n".join(lines).encode()


KINDS: dict[str, tuple[Mutation, ...]] = {
    "bytes": BYTES,
    "json": (any_json, any_json, any_json, digits, any_bytes),
    "header": (any_header,),
    "pickle": (any_pickle,),
    "archive": (zip_field, zipped_pickle, zipped_pickle, any_bytes),
    "archives": (zip_field, zip_field, number, any_bytes),
    "yaml": (line, line, line, any_bytes),
}
"""Which damage suits which kind of file."""


LARGEST = 256 << 10


def mutate(data: bytes, kind: str, rng: Random, others: Sequence[bytes]) -> bytes:
    """One to four mutations; now and then the tail of another input instead."""
    if rng.random() < 0.05:
        other = rng.choice(others)
        return data[: _at(data, rng)] + other[_at(other, rng) :]
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        data = rng.choice(KINDS[kind])(data, rng)
    return data[:LARGEST]
