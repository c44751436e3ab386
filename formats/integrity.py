"""`integrity.json`: the sha256 of every file of an iteration folder, as megatron-core writes and checks it.

Form: `{"algorithm": "sha256", "files": {relative name: hex}}` (`dist_checkpointing/validation.py`). megatron-core's own
writer lists the files right in the folder; its verifier follows names into sub-folders, so all are listed here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from formats.errors import UserError
from formats.folder import FileRef, Folder
from formats.json_objects import read_json
from formats.relative_names import check_below

FILE = "integrity.json"
ALGORITHM = "sha256"


class Hash(Protocol):
    """A hash object of hashlib."""

    def update(self, data: memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


def make(hashes: Mapping[str, str]) -> bytes:
    """Return `integrity.json` for hashes by file name. Its size depends only on the names."""
    return json.dumps({"algorithm": ALGORITHM, "files": dict(sorted(hashes.items()))}, indent=2).encode()


def read(folder: Folder) -> dict[str, str]:
    """Read the hashes that `integrity.json` lists. Raises UserError if they are malformed or name files outside the folder."""
    document = read_json(folder, FILE)
    files: Any = document.get("files")
    if document.get("algorithm", ALGORITHM) != ALGORITHM or not isinstance(files, dict):
        raise UserError(f"`{FILE}` is not a list of {ALGORITHM} hashes", hint="the file is damaged")
    for name, digest in cast("dict[str, Any]", files).items():
        check_below(name, source=FILE)
        if not isinstance(digest, str):
            raise UserError(f"`{FILE}` gives no hash of `{name}`", hint="the file is damaged")
    return cast("dict[str, str]", files)


def hash_file(file: FileRef, progress: Callable[[int], None] = lambda _count: None) -> str:
    """Return the sha256 of a file as hex; `progress` gets the bytes of each step."""
    digest = hashlib.sha256()
    for band in file.bands():
        digest.update(band)
        progress(len(band))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Check:
    """The result of a check: sorted names of `things` (files or tensors), and in words what is `not_covered` by hashes.

    `masters` counts the weights whose fp32 master was compared; `wrong_masters` names those that do not round to their weight.
    `without_masters` lists, in words, the weights that were not compared, and why.
    """

    things: str
    checked: int
    not_covered: str
    changed: list[str]
    missing: list[str]
    unlisted: list[str]
    masters: int = 0
    wrong_masters: list[str] = field(default_factory=list[str])
    without_masters: list[str] = field(default_factory=list[str])

    @property
    def whole(self) -> bool:
        return not (self.changed or self.missing or self.unlisted or self.wrong_masters)


def check(folder: Folder, listed: Mapping[str, str], *, workers: int, progress: Callable[[int], None]) -> Check:
    """Hash every listed file on `workers` threads, and report changed, missing and unlisted files."""
    existing = {name for name in folder.files() if name != FILE}
    missing = sorted(listed.keys() - existing)
    hashes = hash_files(folder, sorted(listed.keys() & existing), workers=workers, progress=progress)
    changed = [name for name, digest in hashes.items() if digest != listed[name]]
    unlisted = sorted(existing - listed.keys())
    if any("/" in name for name in listed):
        return Check("files", len(listed), "", changed, missing, unlisted)
    above = [name for name in unlisted if "/" not in name]  # megatron-core itself lists no sub-folders
    below = "files in sub-folders" if len(above) < len(unlisted) else ""
    return Check("files", len(listed), below, changed, missing, above)


def hash_files(
    folder: Folder, names: Sequence[str], *, workers: int, progress: Callable[[int], None] = lambda _count: None
) -> dict[str, str]:
    """Return the sha256 of files by name, hashed on `workers` threads."""

    def digest(name: str) -> str:
        return hash_file(FileRef(folder, name), progress)

    with ThreadPoolExecutor(workers, thread_name_prefix="hash") as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
