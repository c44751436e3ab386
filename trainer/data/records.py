"""Read records from files: lines of JSON, rows of parquet, rows of a saved `datasets` folder, or whole text files.

Files are streamed; none is read as a whole. What a record means is for the caller: `readers` takes one text from each,
`chat.examples` one example.
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

MAX_RECORD_BYTES = 256 * 2**20
"""Bytes of one record. A tokenizer needs about fifty times as much memory for it."""

_DATASET_DICT_FILE = "dataset_dict.json"  # in a folder written by `DatasetDict.save_to_disk`
_DATASET_FILES = ("dataset_info.json", "state.json")  # in a folder written by `Dataset.save_to_disk`

_ROWS_PER_BATCH = 256  # of a table: a few MB of typical texts


class UnusableError(Exception):
    """An example cannot be used. `reason` is counted, so it is the same for all of its kind; `detail` is about this example."""

    def __init__(self, reason: str, detail: str = "", *, hint: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.hint = reason, hint


@dataclass(frozen=True, slots=True)
class Record:
    """One record and its position in a file."""

    path: Path
    number: int | None
    """Line or row, from 1; None if the file is the record."""

    data: bytes | dict[str, Any]
    """The bytes of a line or a file; for a table, the values of the row by column name."""

    size: int = 0
    """Bytes that were read from the file for this record; an average for tables."""

    @property
    def location(self) -> str:
        """Return the file, and the line or row, for a message."""
        unit = "line" if isinstance(self.data, bytes) else "row"
        return f"`{self.path}`" if self.number is None else f"`{self.path}`, {unit} {self.number}"

    def fields(self) -> dict[str, Any]:
        """Return the values by name. Raises UnusableError if a line is not a JSON object.

        Rows of a table all have the same fields at every depth, so null means that the field was absent; such fields are dropped.
        """
        if isinstance(self.data, dict):
            return _without_nulls(self.data)
        try:
            value = json.loads(self.data)
        except UnicodeDecodeError as error:
            raise UnusableError("it is not UTF-8", fault(error)) from error
        except (ValueError, RecursionError) as error:
            raise UnusableError("it is not JSON", fault(error)) from error
        if not isinstance(value, dict):
            raise UnusableError("it is not a JSON object", f"it is {format_untrusted(value)}")
        return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(member) for name, member in value.items() if member is not None}
    return [_without_nulls(member) for member in value] if isinstance(value, list) else value


def read_records(path: Path, *, what: str, column: str | None = None) -> Iterator[Record]:
    """Yield the records of a .jsonl file, a .parquet file or a folder saved by `datasets`, in order.

    `what` names a record in messages. If `column` is given, only that column of a table is read; it must be text. Raises
    UserError if the file cannot be read.
    """
    if path.is_dir():
        return _read_saved_dataset(path, column)
    return _read_table(path, column) if path.suffix == ".parquet" else _read_lines(path, what=what)


def _read_lines(path: Path, *, what: str) -> Iterator[Record]:
    """Yield the lines of a file, without blank ones."""
    with text_files.open_lines(path, what=what) as file:
        number = 0
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if len(line) > MAX_RECORD_BYTES:
                raise record_too_long(f"`{path}`, line {number}", what, f"a .jsonl file holds one {what} per line")
            if not line.isspace():
                yield Record(path, number, line, len(line))


def _read_table(path: Path, column: str | None) -> Iterator[Record]:
    import pyarrow as pa  # noqa: PLC0415 - needed for such files only
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"`{path}` is not readable as parquet", hint="fetch the file again") from error
    with file:
        if column is not None:
            _check_text(path, file.schema_arrow, column)
        number, share = 0, path.stat().st_size // max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=None if column is None else [column]):
            for row in batch.to_pylist():
                number += 1
                yield Record(path, number, row, share)


def _read_saved_dataset(folder: Path, column: str | None) -> Iterator[Record]:
    datasets = import_datasets(f"`{folder}` was saved by Hugging Face `datasets`")
    try:
        dataset = datasets.load_from_disk(str(folder)).with_format(None)
    except Exception as error:  # any of many kinds, from several libraries
        raise UserError(f"`{folder}` is not readable as a folder of `datasets`: {fault(error)}", hint="save it again") from error
    if column is not None:
        _check_text(folder, dataset.features.arrow_schema, column)
        dataset = dataset.select_columns([column])
    share = sum(path.stat().st_size for path in saved_dataset_files(folder)) // max(len(dataset), 1)
    for number, row in enumerate(dataset, 1):
        yield Record(folder, number, row, share)


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` wrote this folder."""
    return all((folder / name).is_file() for name in _DATASET_FILES)


def saved_dataset_files(folder: Path) -> list[Path]:
    """Return the files that the rows of a saved dataset depend on."""
    return [*sorted(folder.glob("*.arrow")), folder / _DATASET_FILES[1]]


def is_dataset_dict(folder: Path) -> bool:
    """Return whether `DatasetDict.save_to_disk` wrote this folder."""
    return (folder / _DATASET_DICT_FILE).is_file()


def dataset_dict_splits(folder: Path) -> list[str]:
    """Return the names of the splits of a saved DatasetDict. Raises UserError if a listed split is missing."""
    path = folder / _DATASET_DICT_FILE
    try:
        splits = json.loads(path.read_bytes())["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        splits = None
    if not isinstance(splits, list) or not all(isinstance(name, str) and is_saved_dataset(folder / name) for name in splits):
        raise UserError(f"`{path}` does not list the splits in its folder", hint="save the DatasetDict again")
    return splits


def import_datasets(why: str) -> Any:
    """Return the package `datasets`. Raises UserError, which begins with `why`, if it is not installed."""
    try:
        import datasets  # noqa: PLC0415 - needed for such data only
    except ImportError:
        raise UserError(
            f"{why}, which is not installed", hint="pip install 'mbtools[datasets]', or save the data as .parquet"
        ) from None
    return datasets


def _check_text(path: Path, schema: Any, column: str) -> None:
    import pyarrow as pa  # noqa: PLC0415

    if column not in schema.names:
        raise UserError(f"`{path}` has no column `{column}`: it has {list_some(schema.names)}", hint="name one with `--json-key`")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"column `{column}` of `{path}` is not text: its type is {kind}", hint="name another with `--json-key`")


def record_too_long(location: str, what: str, hint: str) -> UserError:
    """Return the error for a record above `MAX_RECORD_BYTES`."""
    return UserError(f"{location} is longer than {MAX_RECORD_BYTES} bytes, the limit for one {what}", hint=hint)


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files with one of the suffixes in a folder and its subfolders, sorted by name, without hidden ones."""
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in suffixes)
    visible = (path for path in relative if not any(part.startswith(".") for part in path.parts))
    return [folder / path for path in sorted(visible) if (folder / path).is_file()]


def format_hint(path: Path) -> str:
    """Return the beginning of a hint: how to turn an unsupported file into a supported one."""
    if path.suffix in (".gz", ".bz2", ".xz", ".zst", ".zip"):
        return "unpack it first; "
    if path.suffix in (".json", ".ndjson", ".jsonlines"):
        return f"if it has one JSON object per line, name it `{path.stem}.jsonl`; if it is one array, `jq -c '.[]'` makes lines; "
    return ""


def list_some(names: Iterable[str]) -> str:
    """Return the first eight names, quoted, for a message."""
    quoted = [f"`{name}`" for name in names]
    return ", ".join(quoted[:8]) + (", …" if len(quoted) > 8 else "") if quoted else "none"
