"""Documents, one text each, in text files, JSON-lines files and parquet files.

Knows which files hold documents, and which part of a record is the text. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from formats.disk import user_errors
from formats.errors import UserError, is_text
from formats.faults import fault
from trainer.data import records, text_files
from trainer.data.records import Record, UnusableError, names

TEXT = (".txt", ".md", ".py")
"""Files that are one document each."""

KINDS = (
    f"{', '.join(TEXT)} (a document each), .jsonl (one per line), .parquet (one per row), folders that `save_to_disk` of "
    "`datasets` wrote, and `hf://datasets/org/name` on the Hub"
)
_SUFFIXES = (*TEXT, ".jsonl", ".parquet")
_DOCUMENT = "document"


def files(inputs: Iterable[Path]) -> list[Path]:
    """The files to read, in order; of a folder all of a supported kind below it, by name, hidden ones left out. A folder that
    `datasets` saved counts as one file."""
    found = [path for one in inputs for path in (_below(one) if one.is_dir() else [one])]
    for path in found:
        if not path.exists():
            raise UserError(f"`{path}` does not exist", hint=f"inputs are folders or files: {KINDS}")
        if path.suffix not in _SUFFIXES and not records.is_saved(path):
            raise UserError(
                f"`{path}` is of no kind that documents are read from",
                hint=f"{records.way_in(path)}inputs are folders or files: {KINDS}",
            )
    return found


def _below(folder: Path) -> list[Path]:
    if records.is_saved(folder):
        return [folder]
    if (folder / records.MANY).is_file():
        splits = sorted(path.name for path in folder.iterdir() if records.is_saved(path))
        if len(splits) == 1:
            return [folder / splits[0]]
        one = "train" if "train" in splits else "SPLIT"
        raise UserError(f"`{folder}` has several splits: {names(splits)}", hint=f"name one: `{folder / one}`")
    found = records.below(folder, _SUFFIXES)
    if not found:
        raise UserError(f"`{folder}` holds no file that documents are read from", hint=f"supported are {KINDS}")
    return found


def size(path: Path) -> int:
    """Bytes of a file, or of a folder that counts as one."""
    return sum(one.stat().st_size for one in (records.files_of_saved(path) if path.is_dir() else [path]))


def read(paths: Iterable[Path], *, key: str) -> Iterator[Record]:
    """All documents of the files, in order, as they lie there; of tables the column `key` alone."""
    for path in paths:
        with user_errors(path):
            if path.is_dir():
                yield from records.saved(path, key)
            elif path.suffix == ".jsonl":
                yield from records.lines(path, what=_DOCUMENT)
            elif path.suffix == ".parquet":
                yield from records.rows(path, key)
            else:
                yield _whole(path)


def _whole(path: Path) -> Record:
    size = path.stat().st_size
    if size > records.LONGEST:
        hint = "cut it into files of one document each, or make it .jsonl with a document per line"
        raise records.too_long(f"`{path}`", _DOCUMENT, hint)
    data = path.read_bytes()
    text_files.check_encoding(path, data[:64])
    return Record(path, None, data.removeprefix(text_files.UTF8_MARK), size)


def text(record: Record, *, key: str) -> str:
    """The document's text, under `key` where the record has names; UserError says where it is and why it is none."""
    if isinstance(record.data, bytes) and record.number is None:
        try:
            return record.data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{record.place} is not text in UTF-8: {fault(error)}", hint="convert it to UTF-8") from error
    try:
        found = record.fields()
    except UnusableError as error:
        raise UserError(f"{record.place} cannot be read: {error}", hint=f'lines look like {{"{key}": "…"}}, in UTF-8') from error
    if isinstance(record.data, dict) and key not in found:
        raise UserError(f"{record.place} holds no text: it is null", hint="remove such rows")
    return _member(record, found, key)


def _member(record: Record, found: dict[str, object], key: str) -> str:
    if key not in found:
        raise UserError(f"{record.place} has no key `{key}`: it has {names(found)}", hint="name the right one with `--json-key`")
    value = found[key]
    if not isinstance(value, str):
        raise UserError(f"{record.place}: `{key}` is no text but a {type(value).__name__}", hint="name another with `--json-key`")
    if not is_text(value):
        raise UserError(
            f"{record.place}: `{key}` holds half a surrogate pair, which is no text", hint="remove or repair the line"
        )
    return value
