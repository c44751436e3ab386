"""Documents in text files, JSON-lines files and parquet files, one after the other, never a whole file of many.

Knows how documents lie in files and what makes one unreadable. Knows nothing of tokens. A document itself is held whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.disk import explained
from formats.errors import UserError
from formats.faults import fault
from trainer.data import text_files

TEXT = (".txt", ".md", ".py")
"""Files that are one document each."""

KINDS = f"{', '.join(TEXT)} (a document each), .jsonl (one per line), .parquet (one per row)"

LONGEST = 256 * 2**20
"""Bytes of one document. A tokenizer needs some fifty times as much memory for it."""

_ROWS = 256  # of a parquet file at a time: some MB of usual texts


@dataclass(frozen=True, slots=True)
class Raw:
    """A document as it lies in a file."""

    path: Path
    number: int | None
    """Line or row, from 1; None where the file is the document."""

    data: bytes | str | None
    key: str | None
    """The member of a JSON object that `data` is; None where it is the text itself."""

    size: int
    """Bytes of the file that were read for it."""

    @property
    def place(self) -> str:
        """For a message: where this document is."""
        unit = "row" if self.path.suffix == ".parquet" else "line"
        return f"`{self.path}`" if self.number is None else f"`{self.path}`, {unit} {self.number}"


def files(inputs: Iterable[Path]) -> list[Path]:
    """The files to read, in order; of a folder all of a supported kind below it, by name, hidden ones left out."""
    found = [path for one in inputs for path in (_below(one) if one.is_dir() else [one])]
    for path in found:
        if not path.is_file():
            raise UserError(f"`{path}` does not exist", hint=f"inputs are folders or files: {KINDS}")
        if not _supported(path):
            raise UserError(
                f"`{path}` is of no kind that documents are read from", hint=f"{way_in(path)}inputs are folders or files: {KINDS}"
            )
    return found


def way_in(path: Path) -> str:
    """What would make a file of another kind one that is read, for the beginning of a hint."""
    if path.suffix in (".gz", ".bz2", ".xz", ".zst", ".zip"):
        return "unpack it first; "
    if path.suffix in (".json", ".ndjson", ".jsonlines"):
        return f"if it has one JSON object per line, name it `{path.stem}.jsonl`; if it is one array, `jq -c '.[]'` makes lines; "
    return ""


def _below(folder: Path) -> list[Path]:
    inside = (path.relative_to(folder) for path in folder.rglob("*"))
    shown = (path for path in inside if not any(part.startswith(".") for part in path.parts))
    found = [folder / path for path in sorted(shown) if _supported(path) and (folder / path).is_file()]
    if not found:
        raise UserError(f"`{folder}` holds no file that documents are read from", hint=f"supported are {KINDS}")
    return found


def _supported(path: Path) -> bool:
    return path.suffix in (*TEXT, ".jsonl", ".parquet")


def read(paths: Iterable[Path], *, key: str) -> Iterator[Raw]:
    """All documents of the files, in order, as they lie there."""
    for path in paths:
        with explained(path):
            if path.suffix == ".jsonl":
                yield from lines(path, key)
            elif path.suffix == ".parquet":
                yield from _rows(path, key)
            else:
                yield _whole(path)


def _whole(path: Path) -> Raw:
    size = path.stat().st_size
    if size > LONGEST:
        raise _too_long(f"`{path}`", "cut it into files of one document each, or make it .jsonl with a document per line")
    data = path.read_bytes()
    text_files.check_encoding(path, data[:64])
    return Raw(path, None, data.removeprefix(text_files.UTF8_MARK), None, size)


def lines(path: Path, key: str | None) -> Iterator[Raw]:
    """The lines of a file that are not blank, in order."""
    with text_files.open_lines(path, what="document" if key else "example") as file:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise _too_long(f"`{path}`, line {number}", "a .jsonl file holds one document per line")
            if not line.isspace():
                yield Raw(path, number, line, key, len(line))


def _rows(path: Path, key: str) -> Iterator[Raw]:
    import pyarrow as pa  # noqa: PLC0415 - only those with such files need it
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"`{path}` is not readable as parquet", hint="fetch the file again") from error
    with file:
        _check_column(path, file.schema_arrow, key)
        number, share = 0, path.stat().st_size // max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=_ROWS, columns=[key]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield Raw(path, number, text, None, share)


def _check_column(path: Path, schema: Any, key: str) -> None:
    import pyarrow as pa  # noqa: PLC0415

    if key not in schema.names:
        raise UserError(f"`{path}` has no column `{key}`: it has {names(schema.names)}", hint="name one with `--json-key`")
    kind = schema.field(key).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"column `{key}` of `{path}` is no text: it is {kind}", hint="name another with `--json-key`")


def _too_long(place: str, hint: str) -> UserError:
    return UserError(f"{place} is longer than {LONGEST} bytes, the most for one document", hint=hint)


def text(raw: Raw) -> str:
    """The document's text; UserError says where it is and why it is none."""
    if raw.data is None:
        raise UserError(f"{raw.place} holds no text: it is null", hint="remove such rows")
    if isinstance(raw.data, str):
        return raw.data
    try:
        content = raw.data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{raw.place} is not text in UTF-8: {fault(error)}", hint="convert it to UTF-8") from error
    return content if raw.key is None else _member(raw, content, raw.key)


def _member(raw: Raw, line: str, key: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{raw.place} is not JSON: {fault(error)}", hint="a .jsonl file holds one JSON object per line"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{raw.place} is no JSON object but a {type(found).__name__}", hint=f'lines look like {{"{key}": "…"}}')
    if key not in found:
        raise UserError(f"{raw.place} has no key `{key}`: it has {names(found)}", hint="name the right one with `--json-key`")
    value = found[key]
    if not isinstance(value, str):
        raise UserError(f"{raw.place}: `{key}` is no text but a {type(value).__name__}", hint="name another with `--json-key`")
    if not is_unicode(value):
        raise UserError(f"{raw.place}: `{key}` holds half a surrogate pair, which is no text", hint="remove or repair the line")
    return value


def is_unicode(value: str) -> bool:
    """Can it be encoded? JSON can name half a surrogate pair, which is no text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def names(them: Iterable[str]) -> str:
    """The first few, for a message."""
    listed = [f"`{name}`" for name in them]
    return ", ".join(listed[:8]) + (", …" if len(listed) > 8 else "") if listed else "none"
