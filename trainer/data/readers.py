"""Read documents, one text each, from text files, JSON lines, parquet and folders saved by `datasets`.

Finds the files among the inputs, and the text in each record. Tokenizing is `prepare`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from formats.disk import user_errors
from formats.errors import UserError, is_text
from formats.faults import fault
from trainer.data import records, text_files
from trainer.data.records import Record, UnusableError, list_some

TEXT = (".txt", ".md", ".py")
"""Files that are one document each."""

KINDS = (
    f"{', '.join(TEXT)} (a document each), .jsonl (one per line), .parquet (one per row), folders that `save_to_disk` of "
    "`datasets` wrote, and `hf://datasets/org/name` on the Hub"
)
_SUFFIXES = (*TEXT, ".jsonl", ".parquet")
_DOCUMENT = "document"


def list_inputs(inputs: Iterable[Path]) -> list[Path]:
    """Return the files to read, in order. Folders are replaced by their supported files, sorted by name, without hidden ones; a
    folder saved by `datasets` counts as one file. Raises UserError for a missing or unsupported file."""
    paths = [path for source in inputs for path in (_list_folder(source) if source.is_dir() else [source])]
    for path in paths:
        if not path.exists():
            raise UserError(f"`{path}` does not exist", hint=f"inputs are folders or files: {KINDS}")
        if path.suffix not in _SUFFIXES and not records.is_saved_dataset(path):
            raise UserError(
                f"`{path}` is not a supported document file",
                hint=f"{records.format_hint(path)}inputs are folders or files: {KINDS}",
            )
    return paths


def _list_folder(folder: Path) -> list[Path]:
    if records.is_saved_dataset(folder):
        return [folder]
    if records.is_dataset_dict(folder):
        splits = sorted(records.dataset_dict_splits(folder))
        if len(splits) == 1:
            return [folder / splits[0]]
        example = "train" if "train" in splits else "SPLIT"
        raise UserError(f"`{folder}` has several splits: {list_some(splits)}", hint=f"name one: `{folder / example}`")
    paths = records.list_files(folder, _SUFFIXES)
    if not paths:
        raise UserError(f"`{folder}` has no supported document files", hint=f"supported are {KINDS}")
    return paths


def input_size(path: Path) -> int:
    """Return the bytes of a file, or of a folder saved by `datasets`."""
    return sum(file.stat().st_size for file in (records.saved_dataset_files(path) if path.is_dir() else [path]))


def read_documents(paths: Iterable[Path], *, key: str) -> Iterator[Record]:
    """Yield the documents of the files as records, in order. Of tables only the column `key` is read."""
    for path in paths:
        with user_errors(path):
            if path.suffix in TEXT and not path.is_dir():
                yield _read_text_file(path)
            else:
                yield from records.read_records(path, what=_DOCUMENT, column=key)


def _read_text_file(path: Path) -> Record:
    size = path.stat().st_size
    if size > records.MAX_RECORD_BYTES:
        hint = "cut it into files of one document each, or make it .jsonl with a document per line"
        raise records.record_too_long(f"`{path}`", _DOCUMENT, hint)
    data = path.read_bytes()
    text_files.check_encoding(path, data[:64])
    return Record(path, None, data.removeprefix(text_files.UTF8_BOM), size)


def document_text(record: Record, *, key: str) -> str:
    """Return the text of a document: the whole file, or the value of `key`. Raises UserError, with the location, if there is no
    text."""
    if isinstance(record.data, bytes) and record.number is None:
        try:
            return record.data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{record.location} is not UTF-8 text: {fault(error)}", hint="convert it to UTF-8") from error
    try:
        fields = record.fields()
    except UnusableError as error:
        hint = f'lines look like {{"{key}": "…"}}, in UTF-8'
        raise UserError(f"{record.location} cannot be read: {error}", hint=hint) from error
    if isinstance(record.data, dict) and key not in fields:
        raise UserError(f"{record.location} has no text: `{key}` is null", hint="remove such rows")
    return _text_field(record, fields, key)


def _text_field(record: Record, fields: dict[str, object], key: str) -> str:
    if key not in fields:
        hint = "name the right one with `--json-key`"
        raise UserError(f"{record.location} has no key `{key}`: it has {list_some(fields)}", hint=hint)
    value = fields[key]
    if not isinstance(value, str):
        hint = "name another with `--json-key`"
        raise UserError(f"{record.location}: `{key}` is not text: it is a {type(value).__name__}", hint=hint)
    if not is_text(value):
        raise UserError(
            f"{record.location}: `{key}` contains an unpaired surrogate, which is not valid text",
            hint="remove or repair the line",
        )
    return value
