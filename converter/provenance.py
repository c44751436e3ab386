"""`conversion.json`: what an output was made from and how, the same whenever and wherever it is made.

It holds no time, path, host, or number of workers. Every Hugging Face tensor stands there with the BLAKE3 of its bytes, taken
as they pass: an import and the export of its output list the same hashes, whatever the layout between. With `--no-integrity`
nothing is hashed, and `blake3` is null.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from converter.version import VERSION
from formats import integrity
from formats.dcp_index import METADATA
from formats.errors import UserError
from formats.folder import FileRef, Folder
from formats.huggingface import Shard
from formats.spec import Document

FILE = "conversion.json"
TOOL = "mbconvert"
"""What it says of who wrote it."""

_UNKNOWN = "0" * 64


def huggingface_source(folder: Folder, shards: Mapping[str, Shard]) -> dict[str, Any]:
    """A Hugging Face source: each weights file's size, the hash of its header, and its own where its keeper tells it."""
    files: dict[str, Any] = {}
    for name, shard in shards.items():
        files[name] = {"bytes": shard.size, "header_sha256": hashlib.sha256(shard.raw).hexdigest()}
        told = folder.sha256(name)
        if told:
            files[name]["sha256"] = told
    return {**folder.origin, "format": "safetensors", "files": files}


def megatron_source(root: Folder, iteration: Folder) -> dict[str, Any]:
    """A Megatron source: its iteration, the hash of its index, and those that its `integrity.json` tells."""
    files: dict[str, Any] = {METADATA: {"sha256": integrity.hash_file(FileRef(iteration, METADATA))}}
    told = _told(iteration)
    files |= {name: {"sha256": digest} for name, digest in sorted(told.items()) if name.endswith(".distcp")}
    return {**root.origin, "format": "torch_dist", "iteration": iteration.name, "files": files}


def _told(iteration: Folder) -> dict[str, str]:
    """What `integrity.json` says; nothing where it is missing or damaged, since no weight depends on it."""
    try:
        return integrity.read(iteration)
    except UserError:
        return {}


def make(
    command: str,
    facts: Mapping[str, Any],
    names: Iterable[str] | None,
    hash_of: Callable[[str], str | None],
    *,
    files: Iterable[str],
) -> Document:
    """The document. `names` are the Hugging Face tensors, None if they are not hashed; those whose hash is not known yet take
    as much room. `files` are all of the output's, so that nothing else is ever taken for a part of it."""
    about: dict[str, Any] = {"tool": TOOL, "version": VERSION, "command": command, **facts, "files": sorted(files)}
    start = (json.dumps({**about, "blake3": None if names is None else {}}, indent=2) + "\n").encode()
    names = sorted(names or ())
    if not names:
        return Document.of(start)
    start, end = start.removesuffix(b"{}\n}\n") + b"{\n", b"\n  }\n}\n"
    lines = (len(json.dumps(name)) + len(_LINE) for name in names)
    size = len(start) + sum(lines) - len(",\n") + len(end)
    return Document(size, lambda: _blocks(start, names, hash_of, end))


_LINE = f'    : "{_UNKNOWN}",\n'  # what surrounds a name
_NAMES_AT_ONCE = 1000


def _blocks(start: bytes, names: Sequence[str], hash_of: Callable[[str], str | None], end: bytes) -> Iterator[bytes]:
    """`json.dumps` of all with an indent would take ten times the document's memory."""
    yield start
    for first in range(0, len(names), _NAMES_AT_ONCE):
        some = names[first : first + _NAMES_AT_ONCE]
        text = ",\n".join(f'    {json.dumps(name)}: "{hash_of(name) or _UNKNOWN}"' for name in some)
        yield (text + (",\n" if first + len(some) < len(names) else "")).encode()
    yield end
