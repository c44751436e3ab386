"""`conversion.json`: what an output was made from and how, the same whenever and wherever it is made.

It holds no time, path, host, or number of workers. It lists the BLAKE3 of every Hugging Face tensor's bytes, taken as they
pass: an import and the export of its output list the same hashes, whatever the layout between. A reshard lists those of
Megatron's tensors, layer by layer, and what the source's `conversion.json` said. With `--no-integrity` nothing is hashed, and
`blake3` is null.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from blake3 import blake3

from converter.values import KEEP
from converter.version import VERSION
from formats import integrity
from formats.dcp_index import METADATA
from formats.detect import detect
from formats.errors import UserError
from formats.folder import FileRef, Folder
from formats.huggingface import HuggingFaceReader, Shard
from formats.json_objects import read_json
from formats.megatron_reader import MegatronReader
from formats.spec import Document, TensorSpec

FILE = "conversion.json"
TOOL = "mbconvert"
"""The value of `tool`, by which an output of this program is known."""

_UNKNOWN = "0" * 64


def huggingface_source(folder: Folder, shards: Mapping[str, Shard]) -> dict[str, Any]:
    """Describe a Hugging Face source: the size of each weights file, the sha256 of its header, and its own where the Hub or
    the object store has it."""
    files: dict[str, Any] = {}
    for name, shard in shards.items():
        files[name] = {"bytes": shard.size, "header_sha256": hashlib.sha256(shard.raw).hexdigest()}
        if digest := folder.sha256(name):
            files[name]["sha256"] = digest
    return {**folder.origin, "format": "safetensors", "files": files}


def chunks(reader: HuggingFaceReader) -> dict[str, Any]:
    """Describe a model that is stored in chunks: the size of each file, and the sha256 of the index."""
    files: dict[str, Any] = {name: {"bytes": reader.folder.size(name)} for name in sorted(reader.files)}
    if METADATA in files:
        files[METADATA]["sha256"] = integrity.hash_file(FileRef(reader.folder, METADATA))
    return {**reader.folder.origin, "format": detect(reader.folder).name.lower(), "files": files}


def megatron_source(root: Folder, reader: MegatronReader) -> dict[str, Any]:
    """Describe a Megatron source: its iteration, the sha256 of its index, and those of data files that `integrity.json` lists."""
    iteration = reader.folder
    index = (FileRef(iteration, name) for name in sorted(reader.index_files))
    files: dict[str, Any] = {file.name: {"sha256": integrity.hash_file(file)} for file in index}
    listed = _listed(iteration)
    files |= {name: {"sha256": digest} for name, digest in sorted(listed.items()) if name.endswith(".distcp")}
    return {**root.origin, "format": detect(iteration).name.lower(), "iteration": iteration.name, "files": files}


def is_untouched_import(iteration: Folder) -> bool:
    """Return whether an iteration says that it is a plain import, whose values are unchanged. A trained one says nothing here."""
    record = recorded(iteration)
    while _is_ours(record, "reshard"):
        record = _object(_object(record, "source"), "conversion")
    return _is_ours(record, "hf-to-mcore")


def _is_ours(record: Mapping[str, Any], command: str) -> bool:
    """Is this what a command of this program writes that cast nothing?"""
    kept = _object(record, "options").get("dtype") == KEEP
    return kept and (record.get("tool"), record.get("command")) == (TOOL, command)


def _object(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def recorded(iteration: Folder) -> dict[str, Any]:
    """Return what an iteration's `conversion.json` says of its origin: all but its files and hashes. Empty if it has none."""
    document = read_json(iteration, FILE) if iteration.has(FILE) else {}
    return {name: value for name, value in document.items() if name not in ("files", "blake3")}


def _listed(iteration: Folder) -> dict[str, str]:
    """Return the hashes of `integrity.json`; none where it is missing or damaged, since no weight depends on it."""
    try:
        return integrity.read(iteration)
    except UserError:
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What `conversion.json` says of an output. Plain data: hashes are filled in when the document is written."""

    command: str
    fields: Mapping[str, Any]
    """What it says beside the command, the files and the hashes of tensors."""

    tensors: Mapping[str, TensorSpec]
    """The tensors that are hashed as their bytes pass. Those in `aliases` may be among them."""

    passing: Literal["read", "made"]
    """Whether these are the tensors that are read, or those that are made."""

    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Further tensors, by the tensor that each equals."""

    hashed: bool = True
    """Whether tensors are hashed. If not, the document lists no hashes."""

    def document(self, hashes: Mapping[str, str], files: Iterable[str]) -> Document:
        """Return the document, with the `hashes` known and the names of all `files` of the output.

        A hash that is not known yet takes as much room. Whatever is not in `files` is never taken for a part of the output.
        """
        names = self._names() if self.hashed else None
        about: dict[str, Any] = {"tool": TOOL, "version": VERSION, "command": self.command, **self.fields}
        about |= {"files": sorted(files), "blake3": None if names is None else {}}
        start = (json.dumps(about, indent=2) + "\n").encode()
        if not names:
            return Document.of(start)
        return _with_hashes(start, names, lambda name: self._hash_of(name, hashes))

    def _names(self) -> list[str]:
        """Return all tensors with a hash, in order."""
        more = self.aliases.keys() - self.tensors.keys()
        return sorted([*self.tensors, *more])

    def _hash_of(self, name: str, hashes: Mapping[str, str]) -> str | None:
        known = self.aliases.get(name, name)
        if known in self.tensors and not self.tensors[known].nbytes:
            return blake3().hexdigest()  # of a tensor without elements nothing passes
        return hashes.get(known) or hashes.get(name)


def _with_hashes(start: bytes, names: Sequence[str], hash_of: Callable[[str], str | None]) -> Document:
    """Return a document that ends with an object of hashes, which is empty in `start`."""
    start, end = start.removesuffix(b"{}\n}\n") + b"{\n", b"\n  }\n}\n"
    lines = sum(map(len, map(_QUOTED, names))) + len(names) * len(_LINE)
    size = len(start) + lines - len(",\n") + len(end)
    return Document(size, lambda: _blocks(start, names, hash_of, end))


_QUOTED = json.JSONEncoder().encode
_LINE = f'    : "{_UNKNOWN}",\n'  # a line without its name
_NAMES_AT_ONCE = 1000


def _blocks(start: bytes, names: Sequence[str], hash_of: Callable[[str], str | None], end: bytes) -> Iterator[bytes]:
    """Yield the document in parts: `json.dumps` of all with an indent would take ten times its memory."""
    yield start
    for first in range(0, len(names), _NAMES_AT_ONCE):
        some = names[first : first + _NAMES_AT_ONCE]
        text = ",\n".join(f'    {json.dumps(name)}: "{hash_of(name) or _UNKNOWN}"' for name in some)
        yield (text + (",\n" if first + len(some) < len(names) else "")).encode()
    yield end
