"""Store tokenized examples on disk. A store is written once, in a stream, and mapped by every process of a node.

A folder has `tokens.bin` (uint16 or int32, one example after another), `trained.bin` (one bit per token), `offsets.npy` (int64
[examples + 1], the start of each example and the end of the last), `groups.npy` if conversations have several examples, and
`about.json`. Rows that `mbtrain pack` made are in `rows.npy` and `row_starts.npy`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from formats.errors import UserError
from formats.faults import fault
from trainer.data import cache
from trainer.data.chat.packing import Rows

VERSION = 1
ABOUT, OFFSETS, ROWS = "about.json", "offsets.npy", ("rows.npy", "row_starts.npy")
_GROUPS = "groups.npy"
_TOKENS, _TRAINED = "tokens.bin", "trained.bin"
_BUFFER_TOKENS = 2**20
"""Tokens that are collected before a write."""


class Tokenized(Protocol):
    """A tokenized example with a loss mask: `trainer.data.chat.tokenized.Tokenized`."""

    @property
    def tokens(self) -> np.ndarray:
        """The tokens, integers [length]."""
        ...

    @property
    def trained(self) -> np.ndarray:
        """Whether each token is learned, bool [length]."""
        ...


@dataclass(eq=False)
class Store:
    """A folder that `write` made. Each process maps the files when it first reads them."""

    folder: Path
    about: Mapping[str, Any]
    _mapped: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.about["examples"]

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each example, int64 [examples]."""
        return np.diff(self._array("offsets"))

    def __getitem__(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens [length] of an example, and whether each is learned, bool [length]."""
        start, end = self._array("offsets")[example : example + 2].tolist()
        bits = np.unpackbits(self._array("trained")[start // 8 : -(-end // 8)])[start % 8 :]
        return self._array("tokens")[start:end], bits[: end - start].astype(bool)

    def _array(self, name: str) -> np.ndarray:
        if name not in self._mapped:
            self._mapped[name] = self._open(name)
        return self._mapped[name]

    def _open(self, name: str) -> np.ndarray:
        if name == "offsets":
            return np.load(self.folder / OFFSETS, mmap_mode="r", allow_pickle=False)
        file, kind = (_TOKENS, self.about["dtype"]) if name == "tokens" else (_TRAINED, "uint8")
        return np.memmap(self.folder / file, dtype=kind, mode="r")

    @property
    def groups(self) -> np.ndarray:
        """Return the conversation number of each example, int64 [examples], ascending from 0. A conversation is never divided
        among splits."""
        path = self.folder / _GROUPS
        return np.load(path, allow_pickle=False) if path.is_file() else np.arange(len(self))

    @property
    def rows(self) -> Rows | None:
        """Return the rows that `mbtrain pack` made; None if there are none."""
        if not (self.folder / ROWS[0]).is_file():
            return None
        return Rows(*(np.load(self.folder / name, mmap_mode="r", allow_pickle=False) for name in ROWS))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped files, which pickle would copy; the receiving process maps them itself."""
        return {**self.__dict__, "_mapped": {}}


def write(folder: Path, examples: Iterable[Tokenized], *, vocab_size: int, about: Callable[[], Mapping[str, Any]]) -> None:
    """Write examples to an existing folder, `about.json` last. `about` is called after all examples were read; its result and the
    counts go into `about.json`.

    Raises UserError for a token outside the vocabulary.
    """
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
    lengths, counts = [], {"tokens": 0, "trained": 0, "largest": 0}
    first_of_group: list[bool] = []
    with (folder / _TOKENS).open("wb") as tokens, (folder / _TRAINED).open("wb") as trained:
        incomplete_byte = np.zeros(0, bool)  # bits of an incomplete byte
        for words, marks in _batches(_note_beginnings(examples, first_of_group), lengths, vocab_size):
            tokens.write(words.astype(dtype).tobytes())
            marks = np.concatenate((incomplete_byte, marks))  # noqa: PLW2901
            num_bits = len(marks) - len(marks) % 8
            trained.write(np.packbits(marks[:num_bits]).tobytes())
            incomplete_byte = marks[num_bits:]
            counts["tokens"] += len(words)
            counts["largest"] = max(counts["largest"], int(words.max(initial=0)))
            counts["trained"] += int(marks[:num_bits].sum())
        trained.write(np.packbits(incomplete_byte).tobytes())
        counts["trained"] += int(incomplete_byte.sum())
        _sync(tokens, trained)
    save_array(folder / OFFSETS, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64))
    if not all(first_of_group):
        save_array(folder / _GROUPS, np.cumsum(first_of_group, dtype=np.int64) - 1)
    document = {**about(), "version": VERSION, "dtype": dtype.name, "vocab_size": vocab_size, "examples": len(lengths), **counts}
    with (folder / ABOUT).open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        _sync(file)


def _note_beginnings(examples: Iterable[Tokenized], first_of_group: list[bool]) -> Iterator[Tokenized]:
    """Yield the examples, and append to `begun` whether each begins a conversation."""
    for example in examples:
        first_of_group.append(not getattr(example, "continues_previous", False))
        yield example


def _batches(examples: Iterable[Tokenized], lengths: list[int], vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the concatenated tokens and masks of many examples, and append their lengths to `lengths`."""
    words: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    gathered = 0
    for example in examples:
        lengths.append(len(example.tokens))
        words.append(example.tokens)
        marks.append(example.trained)
        gathered += len(example.tokens)
        if gathered >= _BUFFER_TOKENS:
            yield _check_vocabulary(np.concatenate(words), vocab_size), np.concatenate(marks)
            words, marks, gathered = [], [], 0
    if words:
        yield _check_vocabulary(np.concatenate(words), vocab_size), np.concatenate(marks)


def _check_vocabulary(words: np.ndarray, vocab_size: int) -> np.ndarray:
    """Raise UserError for a token id outside the vocabulary; on a GPU it would be a device-side assertion."""
    if len(words) and words.max() >= vocab_size:
        raise UserError(
            f"an example has the token id {words.max()}, but the vocabulary has {vocab_size}",
            hint="set `tokenizer.tokenizer_model` to the model's tokenizer",
        )
    return words


def save_array(path: Path, array: np.ndarray) -> None:
    """Save an array to a file, and flush it to the disk."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        _sync(file)


def _sync(*files: Any) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def open_store(folder: Path) -> Store:
    """Open a folder that `write` made. Raises UserError if it is not one, has another version, or is incomplete."""
    try:
        description = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"`{folder}` has no packed examples: {fault(error)}", hint="pack the examples with `mbtrain pack`"
        ) from error
    if not isinstance(description, dict) or description.get("version") != VERSION:
        raise UserError(f"`{folder}` was written by another version of `mbtrain pack`", hint="pack the examples again")
    store = Store(folder, description)
    _check_sizes(store)
    return store


def _check_sizes(store: Store) -> None:
    tokens, description = store.about["tokens"], store.about
    expected = {_TOKENS: tokens * np.dtype(description["dtype"]).itemsize, _TRAINED: -(-tokens // 8)}
    for name, size in expected.items():
        path = store.folder / name
        actual = path.stat().st_size if path.is_file() else 0
        if actual != size:
            raise UserError(f"`{path}` has {actual} bytes, but `{ABOUT}` says {size}", hint="make the folder again")


def is_store(path: Path) -> bool:
    """Return whether a folder has tokenized examples."""
    return (path / ABOUT).is_file() and (path / OFFSETS).is_file()


def open_or_write(
    folder: Path,
    name: str,
    examples: Callable[[], Iterable[Tokenized]],
    *,
    vocab_size: int,
    about: Callable[[], Mapping[str, Any]],
) -> Store:
    """Open the store `folder / name`; write it from `examples()` first if it is missing. See `trainer.data.cache`."""
    target = folder / name
    if not is_store(target):
        cache.write_folder(target, lambda partial: write(partial, examples(), vocab_size=vocab_size, about=about))
    return open_store(target)
