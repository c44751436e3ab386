"""Examples as they lie in files: JSON lines, parquet, or folders that Hugging Face `datasets` saved, one after the other.

Knows where an example stands, and what makes it unreadable. Knows nothing of conversations, tokens or shares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from formats.disk import user_errors
from formats.errors import UserError
from trainer.data import records
from trainer.data.records import Record

KINDS = (
    ".jsonl (an example per line), .parquet (one per row), folders of these, folders that `save_to_disk` of `datasets` wrote, "
    "and `hf://datasets/org/name` on the Hub"
)

_LIKE_AN_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w-]*")
_SUFFIXES = (".jsonl", ".parquet")
_SHARD = re.compile(r"-\d+-of-\d+$")
_USUAL = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])")  # what names of splits begin with


@dataclass(frozen=True, slots=True)
class Source:
    """One body of examples, numbered from 0 in the order in which `records` gives them."""

    path: Path
    split: str | None = None
    """Which one, where `path` is a folder of several."""

    @property
    def name(self) -> str:
        """For a message."""
        return f"`{self.path}`" if self.split is None else f"split `{self.split}` of `{self.path}`"

    def records(self) -> Iterator[Record]:
        """All examples, in order, as they lie there; blank lines are none. UserError where a file cannot be read at all."""
        with user_errors(self.path):
            if records.is_saved(self._folder):
                yield from records.saved(self._folder)
                return
            for path in self.files():
                yield from records.rows(path) if path.suffix == ".parquet" else records.lines(path, what="example")

    def files(self) -> list[Path]:
        """The files that the examples depend on, in order."""
        if records.is_saved(self._folder):
            return records.files_of_saved(self._folder)
        if not self.path.exists():
            on_the_hub = f"on the Hub it is `hf://datasets/{self.path}`; " if _LIKE_AN_ID.fullmatch(str(self.path)) else ""
            raise UserError(f"`{self.path}` does not exist", hint=f"{on_the_hub}examples are read from {KINDS}")
        found = records.below(self.path, _SUFFIXES) if self.path.is_dir() else [self.path]
        found = [path for path in found if self.split is None or _split_of(path) == self.split]
        if not found or any(path.suffix not in _SUFFIXES for path in found):
            raise UserError(
                f"`{self.path}` is nothing that examples are read from",
                hint=f"{records.way_in(self.path)}supported are {KINDS}",
            )
        return found

    @property
    def _folder(self) -> Path:
        """Where `datasets` would have saved it."""
        return self.path if self.split is None else self.path / self.split


def splits_of(path: Path) -> list[str]:
    """The names of the splits that a folder holds: a DatasetDict's, or those that its files are named after, as the Hub has
    them (`test-00000-of-00002.parquet`). None for anything else. UserError where a DatasetDict is damaged."""
    if not (path / records.MANY).is_file():
        return _split_names(path) if path.is_dir() and not records.is_saved(path) else []
    try:
        found = json.loads((path / records.MANY).read_bytes())["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) and records.is_saved(path / name) for name in found):
        raise UserError(f"`{path / records.MANY}` names no splits that are there", hint="save the DatasetDict again")
    return found


def _split_names(folder: Path) -> list[str]:
    """Files of one name are one body; so are several where none is named as a split."""
    found = sorted({_split_of(path) for path in records.below(folder, _SUFFIXES)})
    return found if len(found) > 1 and any(_USUAL.match(name) for name in found) else []


def _split_of(path: Path) -> str:
    return _SHARD.sub("", path.stem)
