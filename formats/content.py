"""Recognize a file whose content does not match its name, by its first bytes: git-lfs pointer, error page, other format.

Failed downloads leave such files: they have the right name and the wrong content.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from formats.errors import UserError
from formats.folder import Folder

START_BYTES = 512
"""Bytes at a file's start that are enough to recognize it."""

_FETCH = "fetch the file again, for example with `hf download ORG/NAME`"
_TORCH = "load it with the library that saved it, and save it with `save_pretrained`, which writes safetensors"


class Content(NamedTuple):
    """The content of a file in words that follow "is", and what to do about it."""

    what: str
    hint: str


_SERVER = (
    rb"(entry|repository|revision|file|page) not found|(404: )?not found\b|access to (this )?model|unauthorized|forbidden|"
    rb"invalid (username|credentials)|cannot access gated repo|access denied|too many requests|rate limit|"
    rb"internal (server )?error|bad gateway|service unavailable"
)
_PAGE = rb"(\xef\xbb\xbf)?\s*<(!doctype|!--|html|head|body|\?xml|error)"

_BY_START = (
    (
        rb"version https?://[\w.-]*(git-lfs|git-media|hawser)",
        Content(
            "a git-lfs pointer, not the file itself",
            "fetch the file: `git lfs pull` in the repository, or `hf download ORG/NAME`",
        ),
    ),
    (rb"# xet version", Content("a Xet pointer, not the file itself", _FETCH)),
    (
        rb"\xef\xbb\xbf\s*[{\[]",
        Content("JSON behind a byte order mark, which JSON must not have", "save the file as UTF-8 without a byte order mark"),
    ),
    (_PAGE, Content("a web page or an error message of a server", _FETCH)),
    (
        _SERVER,
        Content("an error message of a server", "fetch the file again; gated and private models need `hf auth login` first"),
    ),
    (rb"GGUF|ggml|lmgg|tjgg|fmgg", Content("a GGUF file", "convert the original weights, from which the GGUF file was made")),
    (rb"PK\x03\x04", Content("a zip archive, as `torch.save` writes it", _TORCH)),
    (rb"\x80[\x02-\x05]", Content("a pickle, as `torch.save` writes it", _TORCH)),
    (rb"\x1f\x8b|\xfd7zXZ|BZh|\x28\xb5\x2f\xfd|7z\xbc\xaf", Content("a compressed file", "unpack it first")),
    (rb"\x89HDF", Content("an HDF5 file (TensorFlow, Keras)", _TORCH)),
    (rb"\x93NUMPY", Content("a numpy array", _TORCH)),
)


def recognize(start: bytes) -> Content | None:
    """Return the content of a file that begins with `start` if it is recognized, else None.

    >>> recognize(b"version https://git-lfs.github.com/spec/v1").what
    'a git-lfs pointer, not the file itself'
    """
    flags = re.IGNORECASE | re.DOTALL
    content = next((content for pattern, content in _BY_START if re.match(pattern, start, flags)), None)
    if content is None and len(start) >= 8 and not start.strip(b"\0"):
        return Content("a file that starts with zero bytes: its space was allocated and never filled", _FETCH)
    return content


def refuse_other(folder: Folder, name: str) -> None:
    """Raise UserError if a file of weights or settings is empty, or is recognized as something else."""
    size = folder.size(name)
    if size == 0:
        raise UserError(f"`{name}` is empty", hint=_FETCH)
    start = bytearray(min(size, START_BYTES))
    folder.read_into(name, 0, memoryview(start))
    refuse_start(bytes(start), source=name)


LARGEST_POINTER = 512
"""Upper bound for the bytes of a git-lfs pointer."""


def refuse_pointer(folder: Folder, name: str) -> None:
    """Raise UserError if a small file is a git-lfs or Xet pointer."""
    start = folder.get(name)
    content = recognize(start)
    if content and start.startswith((b"version http", b"# xet")):
        raise UserError(f"`{name}` is {content.what}", hint=content.hint)


def refuse_start(start: bytes, *, source: str) -> None:
    """Raise UserError if these first bytes of `source` are recognized as something else."""
    content = recognize(start[:START_BYTES])
    if content:
        raise UserError(f"`{source}` is {content.what}", hint=content.hint)
