"""What a file holds that is not what its name says, by its first bytes: a git-lfs pointer, an error page, another format.

Downloads leave such files behind: they have the right name, and often nobody has looked into them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from formats.errors import UserError
from formats.folder import Folder

START_BYTES = 512
"""So many bytes of a file are enough to recognize it."""

_FETCH = "fetch the file again, for example with `hf download ORG/NAME`"
_TORCH = "load it with the library that saved it, and save it with `save_pretrained`, which writes safetensors"


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds, in words that follow "is", and what to do about it."""

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
    """Return what a file that begins with `start` is, where it is something that is often taken for another.

    >>> recognize(b"version https://git-lfs.github.com/spec/v1").what
    'a git-lfs pointer, not the file itself'
    """
    flags = re.IGNORECASE | re.DOTALL
    found = next((content for pattern, content in _BY_START if re.match(pattern, start, flags)), None)
    if found is None and len(start) >= 8 and not start.strip(b"\0"):
        return Content("a file of zero bytes at its start: space was set aside for it and it was never filled", _FETCH)
    return found


def refuse_other(folder: Folder, name: str) -> None:
    """Raise UserError if a file that should hold weights or settings is empty, or recognized as something else."""
    size = folder.size(name)
    if size == 0:
        raise UserError(f"`{name}` is empty", hint=_FETCH)
    start = bytearray(min(size, START_BYTES))
    folder.read_into(name, 0, memoryview(start))
    refuse_start(bytes(start), source=name)


LARGEST_POINTER = 512
"""Bytes of a git-lfs pointer at most, with room to spare."""


def refuse_pointer(folder: Folder, name: str) -> None:
    """Raise UserError if a small file only points at the one that should be there, as git-lfs leaves it."""
    start = folder.get(name)
    found = recognize(start)
    if found and start.startswith((b"version http", b"# xet")):
        raise UserError(f"`{name}` is {found.what}", hint=found.hint)


def refuse_start(start: bytes, *, source: str) -> None:
    """Raise UserError if these first bytes of `source` are recognized as something else."""
    found = recognize(start[:START_BYTES])
    if found:
        raise UserError(f"`{source}` is {found.what}", hint=found.hint)
