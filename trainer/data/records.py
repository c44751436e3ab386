"""Records as they lie in files: lines of JSON, rows of tables, whole files of text, one after the other, never a file of many.

Knows where a record is and what makes a file unreadable. Knows nothing of what records mean: `documents` takes one text from
each, `chat.sources` an example.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import UserError, format_untrusted
from formats.faults import fault
from trainer.data import text_files

LONGEST = 256 * 2**20
"""Bytes of one record. A tokenizer needs some fifty times as much memory for it."""

MANY = "dataset_dict.json"  # what a DatasetDict leaves in its folder
_ONE, _STATE = "dataset_info.json", "state.json"  # and a Dataset in its own

_ROWS = 256  # of a table at a time: some MB of usual texts


class UnusableError(Exception):
    """Why a record cannot be used. `reason` is the same for all of its kind; `detail` says what this one has."""

    def __init__(self, reason: str, detail: str = "", *, hint: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.hint = reason, hint


@dataclass(frozen=True, slots=True)
class Record:
    """A record as it lies in a file."""

    path: Path
    number: int | None
    """Line or row, from 1; None where the file is the record."""

    data: bytes | dict[str, Any]
    """A line or a file; of a table, a row's values by the names of their columns."""

    size: int = 0
    """Bytes of the file that were read for it."""

    @property
    def place(self) -> str:
        """For a message: where this record is."""
        unit = "line" if isinstance(self.data, bytes) else "row"
        return f"`{self.path}`" if self.number is None else f"`{self.path}`, {unit} {self.number}"

    def fields(self) -> dict[str, Any]:
        """What the record holds by name; UnusableError for a line that is no JSON object.

        Rows of a table all have the same fields, at every depth: those that are null were not there when it was made.
        """
        if isinstance(self.data, dict):
            return _without_nulls(self.data)
        try:
            found = json.loads(self.data)
        except UnicodeDecodeError as error:
            raise UnusableError("it is not UTF-8", fault(error)) from error
        except (ValueError, RecursionError) as error:
            raise UnusableError("it is not JSON", fault(error)) from error
        if not isinstance(found, dict):
            raise UnusableError("it is no JSON object", f"it is {format_untrusted(found)}")
        return found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def lines(path: Path, *, what: str) -> Iterator[Record]:
    """The lines of a file that are not blank, in order. `what` is in a line, for messages."""
    with text_files.open_lines(path, what=what) as file:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise too_long(f"`{path}`, line {number}", what, f"a .jsonl file holds one {what} per line")
            if not line.isspace():
                yield Record(path, number, line, len(line))


def rows(path: Path, column: str | None = None) -> Iterator[Record]:
    """The rows of a parquet file, in order; with `column` that one alone, which must be text."""
    import pyarrow as pa  # noqa: PLC0415 - only those with such files need it
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"`{path}` is not readable as parquet", hint="fetch the file again") from error
    with file:
        if column is not None:
            _check_text(path, file.schema_arrow, column)
        number, share = 0, path.stat().st_size // max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=_ROWS, columns=None if column is None else [column]):
            for row in batch.to_pylist():
                number += 1
                yield Record(path, number, row, share)


def saved(folder: Path, column: str | None = None) -> Iterator[Record]:
    """The rows of a folder that a Dataset of Hugging Face `datasets` was saved to; with `column` that one alone."""
    datasets = needed(f"`{folder}` was saved by Hugging Face `datasets`")
    try:
        found = datasets.load_from_disk(str(folder)).with_format(None)
    except Exception as error:  # any of many kinds, from several libraries
        raise UserError(f"`{folder}` is not readable as a folder of `datasets`: {fault(error)}", hint="save it again") from error
    if column is not None:
        _check_text(folder, found.features.arrow_schema, column)
        found = found.select_columns([column])
    share = sum(path.stat().st_size for path in files_of_saved(folder)) // max(len(found), 1)
    for number, row in enumerate(found, 1):
        yield Record(folder, number, row, share)


def is_saved(folder: Path) -> bool:
    """Was one Dataset saved to that folder?"""
    return (folder / _ONE).is_file() and (folder / _STATE).is_file()


def files_of_saved(folder: Path) -> list[Path]:
    """The files that its rows depend on."""
    return [*sorted(folder.glob("*.arrow")), folder / _STATE]


def needed(why: str) -> Any:
    """The package `datasets`. UserError, which begins with `why`, where it is not installed."""
    try:
        import datasets  # noqa: PLC0415 - only those with such data need it
    except ImportError:
        raise UserError(
            f"{why}, which is not installed", hint="pip install 'mbtools[datasets]', or save the data as .parquet"
        ) from None
    return datasets


def _check_text(path: Path, schema: Any, column: str) -> None:
    import pyarrow as pa  # noqa: PLC0415

    if column not in schema.names:
        raise UserError(f"`{path}` has no column `{column}`: it has {names(schema.names)}", hint="name one with `--json-key`")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"column `{column}` of `{path}` is no text: it is {kind}", hint="name another with `--json-key`")


def too_long(place: str, what: str, hint: str) -> UserError:
    """A record that does not fit."""
    return UserError(f"{place} is longer than {LONGEST} bytes, the most for one {what}", hint=hint)


def below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of those kinds below a folder, by name; hidden ones are left out."""
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in suffixes)
    shown_ones = (path for path in inside if not any(part.startswith(".") for part in path.parts))
    return [folder / path for path in sorted(shown_ones) if (folder / path).is_file()]


def way_in(path: Path) -> str:
    """What would make a file of another kind one that is read, for the beginning of a hint."""
    if path.suffix in (".gz", ".bz2", ".xz", ".zst", ".zip"):
        return "unpack it first; "
    if path.suffix in (".json", ".ndjson", ".jsonlines"):
        return f"if it has one JSON object per line, name it `{path.stem}.jsonl`; if it is one array, `jq -c '.[]'` makes lines; "
    return ""


def names(them: Iterable[str]) -> str:
    """The first few, for a message."""
    listed = [f"`{name}`" for name in them]
    return ", ".join(listed[:8]) + (", …" if len(listed) > 8 else "") if listed else "none"
