"""List the files of examples and read them: JSON lines, parquet, and folders saved by Hugging Face `datasets`.

What an example means is for `examples`; shares of a source are `splits`'.
"""

from __future__ import annotations

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

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w-]*")
_SUFFIXES = (".jsonl", ".parquet")
_SHARD = re.compile(r"-\d+-of-\d+$")
_SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])")  # prefixes of split names


@dataclass(frozen=True, slots=True)
class Source:
    """A file or folder of examples, numbered from 0 in the order of `records`."""

    path: Path
    split: str | None = None
    """The split to read if `path` is a folder of several; else None."""

    @property
    def name(self) -> str:
        """Return the path, and the split if there is one, for a message."""
        return f"`{self.path}`" if self.split is None else f"split `{self.split}` of `{self.path}`"

    def records(self) -> Iterator[Record]:
        """Yield all examples, in order, without blank lines. Raises UserError if a file cannot be read."""
        with user_errors(self.path):
            for path in [self._folder] if records.is_saved_dataset(self._folder) else self.files():
                yield from records.read_records(path, what="example")

    def files(self) -> list[Path]:
        """Return the files that the examples depend on, in order. Raises UserError if there are none, or one is unsupported."""
        if records.is_saved_dataset(self._folder):
            return records.saved_dataset_files(self._folder)
        if not self.path.exists():
            on_the_hub = f"on the Hub it is `hf://datasets/{self.path}`; " if _HUB_ID.fullmatch(str(self.path)) else ""
            raise UserError(f"`{self.path}` does not exist", hint=f"{on_the_hub}examples are read from {KINDS}")
        paths = records.list_files(self.path, _SUFFIXES) if self.path.is_dir() else [self.path]
        paths = [path for path in paths if self.split is None or _split_of(path) == self.split]
        if not paths or any(path.suffix not in _SUFFIXES for path in paths):
            raise UserError(
                f"`{self.path}` is not a supported file or folder of examples",
                hint=f"{records.format_hint(self.path)}supported are {KINDS}",
            )
        return paths

    @property
    def _folder(self) -> Path:
        """Return the folder that `datasets` would have saved this source to."""
        return self.path if self.split is None else self.path / self.split


def splits_of(path: Path) -> list[str]:
    """Return the names of the splits in a folder: those of a DatasetDict, or those in its file names, as on the Hub
    (`test-00000-of-00002.parquet`). Return [] for anything else. Raises UserError if a DatasetDict is damaged."""
    if records.is_dataset_dict(path):
        return records.dataset_dict_splits(path)
    return _split_names(path) if path.is_dir() and not records.is_saved_dataset(path) else []


def _split_names(folder: Path) -> list[str]:
    """Return the distinct file names without shard numbers, if there are several and one is a known split name; else []."""
    stems = sorted({_split_of(path) for path in records.list_files(folder, _SUFFIXES)})
    return stems if len(stems) > 1 and any(_SPLIT_NAME.match(name) for name in stems) else []


def _split_of(path: Path) -> str:
    return _SHARD.sub("", path.stem)
