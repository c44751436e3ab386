"""Examples as they lie in files: JSON lines, parquet, or folders that Hugging Face `datasets` saved, one after the other.

Knows where an example stands, and what makes it unreadable. Knows nothing of conversations, tokens or shares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.disk import explained
from formats.errors import UserError, shown
from formats.faults import fault
from trainer.data import documents

KINDS = (
    ".jsonl (an example per line), .parquet (one per row), folders of these, and folders that `save_to_disk` of `datasets` wrote"
)

_ROWS = 256  # of a table at a time: some MB of usual conversations
_SUFFIXES = (".jsonl", ".parquet")
_SHARD = re.compile(r"-\d+-of-\d+$")
_USUAL = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])")  # what names of splits begin with
_ONE, _MANY = "dataset_info.json", "dataset_dict.json"  # what a Dataset and a DatasetDict leave in their folders


class UnusableError(Exception):
    """Why an example cannot be learned from. `reason` is the same for all of its kind; `detail` says what this one has."""

    def __init__(self, reason: str, detail: str = "", *, hint: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.hint = reason, hint


@dataclass(frozen=True, slots=True)
class Record:
    """An example as it lies in a file."""

    path: Path
    number: int
    """Line or row, from 1."""

    data: bytes | dict[str, Any]

    @property
    def place(self) -> str:
        """For a message: where this example is."""
        return f"`{self.path}`, {'line' if isinstance(self.data, bytes) else 'row'} {self.number}"

    def fields(self) -> dict[str, Any]:
        """What the example holds by name; UnusableError for a line that is no JSON object."""
        if isinstance(self.data, dict):
            return self.data
        try:
            found = json.loads(self.data)
        except UnicodeDecodeError as error:
            raise UnusableError("it is not UTF-8", fault(error)) from error
        except (ValueError, RecursionError) as error:
            raise UnusableError("it is not JSON", fault(error)) from error
        if not isinstance(found, dict):
            raise UnusableError("it is no JSON object", f"it is {shown(found)}")
        return found


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
        with explained(self.path):
            if _is_saved(self._folder):
                yield from _saved(self._folder)
                return
            for path in self.files():
                yield from _rows(path) if path.suffix == ".parquet" else _lines(path)

    def files(self) -> list[Path]:
        """The files that the examples depend on, in order."""
        if _is_saved(self._folder):
            return [*sorted(self._folder.glob("*.arrow")), self._folder / "state.json"]
        if not self.path.exists():
            raise UserError(f"`{self.path}` does not exist", hint=f"examples are read from {KINDS}")
        found = _below(self.path) if self.path.is_dir() else [self.path]
        found = [path for path in found if self.split is None or _split_of(path) == self.split]
        if not found or any(path.suffix not in _SUFFIXES for path in found):
            raise UserError(
                f"`{self.path}` is nothing that examples are read from",
                hint=f"{documents.way_in(self.path)}supported are {KINDS}",
            )
        return found

    @property
    def _folder(self) -> Path:
        """Where `datasets` would have saved it."""
        return self.path if self.split is None else self.path / self.split


def splits_of(path: Path) -> list[str]:
    """The names of the splits that a folder holds: a DatasetDict's, or those that its files are named after, as the Hub has
    them (`test-00000-of-00002.parquet`). None for anything else. UserError where a DatasetDict is damaged."""
    if not (path / _MANY).is_file():
        return _split_names(path) if path.is_dir() and not _is_saved(path) else []
    try:
        found = json.loads((path / _MANY).read_bytes())["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) and _is_saved(path / name) for name in found):
        raise UserError(f"`{path / _MANY}` names no splits that are there", hint="save the DatasetDict again")
    return found


def _split_names(folder: Path) -> list[str]:
    """Files of one name are one body; so are several where none is named as a split."""
    found = sorted({_split_of(path) for path in _below(folder)})
    return found if len(found) > 1 and any(_USUAL.match(name) for name in found) else []


def _split_of(path: Path) -> str:
    return _SHARD.sub("", path.stem)


def _is_saved(folder: Path) -> bool:
    return (folder / _ONE).is_file() and (folder / "state.json").is_file()


def _below(folder: Path) -> list[Path]:
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    shown_ones = (path for path in inside if not any(part.startswith(".") for part in path.parts))
    return [folder / path for path in sorted(shown_ones) if (folder / path).is_file()]


def _lines(path: Path) -> Iterator[Record]:
    for raw in documents.lines(path, None):
        assert isinstance(raw.data, bytes)
        assert raw.number is not None
        yield Record(path, raw.number, raw.data)


def _rows(path: Path) -> Iterator[Record]:
    import pyarrow as pa  # noqa: PLC0415 - only those with such files need it
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"`{path}` is not readable as parquet", hint="fetch the file again") from error
    number = 0
    with file:
        for batch in file.iter_batches(batch_size=_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield Record(path, number, row)


def _saved(folder: Path) -> Iterator[Record]:
    try:
        import datasets  # noqa: PLC0415 - only those with such folders need it
    except ImportError:
        raise UserError(
            f"`{folder}` was saved by Hugging Face `datasets`, which is not installed",
            hint="pip install 'mbtools[datasets]', or save the examples as .parquet",
        ) from None
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # any of many kinds, from several libraries
        raise UserError(f"`{folder}` is not readable as a folder of `datasets`: {fault(error)}", hint="save it again") from error
    for number, row in enumerate(found.with_format(None), 1):
        yield Record(folder, number, row)
