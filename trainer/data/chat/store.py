"""Tokenized examples on disk: written once, a part at a time, and mapped by every process of a node.

A folder of `tokens.bin` (uint16 or int32, one example after another), `trained.bin` (a bit per token), `offsets.npy` (int64,
where examples begin, and where the last ends), `groups.npy` where conversations have several examples, and `about.json`. Rows
that were composed beforehand lie beside them. Knows files; knows neither tokenizers nor models.
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
_BUFFER = 2**20
"""Tokens that are gathered before they are written."""


class Tokenized(Protocol):
    """An example in tokens."""

    @property
    def tokens(self) -> np.ndarray:
        """Integers."""
        ...

    @property
    def trained(self) -> np.ndarray:
        """For each token, whether it is learned (bool)."""
        ...


@dataclass(eq=False)
class Store:
    """A folder that `write` made. Maps its files when they are first read, in every process anew."""

    folder: Path
    about: Mapping[str, Any]
    _mapped: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.about["examples"]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        return np.diff(self._array("offsets"))

    def __getitem__(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Its tokens, and for each whether it is learned."""
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
        """Of each example the number of its conversation, ascending from 0; int64. Those of one belong to one split."""
        path = self.folder / _GROUPS
        return np.load(path, allow_pickle=False) if path.is_file() else np.arange(len(self))

    @property
    def rows(self) -> Rows | None:
        """Those composed beforehand; None where there are none."""
        if not (self.folder / ROWS[0]).is_file():
            return None
        return Rows(*(np.load(self.folder / name, mmap_mode="r", allow_pickle=False) for name in ROWS))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}


def write(folder: Path, examples: Iterable[Tokenized], *, vocab_size: int, about: Callable[[], Mapping[str, Any]]) -> None:
    """Examples into files of an existing folder, `about.json` last. What `about` says when all were read is kept along with
    what is counted here.

    Raises UserError for a token that is not in the vocabulary.
    """
    kind = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
    lengths, counts = [], {"tokens": 0, "trained": 0, "largest": 0}
    begun: list[bool] = []
    with (folder / _TOKENS).open("wb") as tokens, (folder / _TRAINED).open("wb") as trained:
        left = np.zeros(0, bool)  # bits that do not fill a byte yet
        for words, marks in _together(_grouped(examples, begun), lengths, vocab_size):
            tokens.write(words.astype(kind).tobytes())
            marks = np.concatenate((left, marks))  # noqa: PLW2901 - with what was left over
            whole = len(marks) - len(marks) % 8
            trained.write(np.packbits(marks[:whole]).tobytes())
            left = marks[whole:]
            counts["tokens"] += len(words)
            counts["largest"] = max(counts["largest"], int(words.max(initial=0)))
            counts["trained"] += int(marks[:whole].sum())
        trained.write(np.packbits(left).tobytes())
        counts["trained"] += int(left.sum())
        _sync(tokens, trained)
    save(folder / OFFSETS, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64))
    if not all(begun):
        save(folder / _GROUPS, np.cumsum(begun, dtype=np.int64) - 1)
    told = {**about(), "version": VERSION, "dtype": kind.name, "vocab_size": vocab_size, "examples": len(lengths), **counts}
    with (folder / ABOUT).open("w", encoding="utf-8") as file:
        json.dump(told, file, indent=2)
        _sync(file)


def _grouped(examples: Iterable[Tokenized], begun: list[bool]) -> Iterator[Tokenized]:
    """The examples; whether each begins a conversation is added to `begun`."""
    for example in examples:
        begun.append(not getattr(example, "goes_on", False))
        yield example


def _together(examples: Iterable[Tokenized], lengths: list[int], vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and marks of many examples at once; their lengths are added to `lengths`."""
    words: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    gathered = 0
    for example in examples:
        lengths.append(len(example.tokens))
        words.append(example.tokens)
        marks.append(example.trained)
        gathered += len(example.tokens)
        if gathered >= _BUFFER:
            yield _checked(np.concatenate(words), vocab_size), np.concatenate(marks)
            words, marks, gathered = [], [], 0
    if words:
        yield _checked(np.concatenate(words), vocab_size), np.concatenate(marks)


def _checked(words: np.ndarray, vocab_size: int) -> np.ndarray:
    """On a GPU, a token beyond the embedding's rows ends the process without saying what was wrong."""
    if len(words) and words.max() >= vocab_size:
        raise UserError(
            f"an example holds the token {words.max()}, but the vocabulary has {vocab_size}",
            hint="set `tokenizer.tokenizer_model` to the model's tokenizer",
        )
    return words


def save(path: Path, array: np.ndarray) -> None:
    """An array into a file that is on the disk when this returns."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        _sync(file)


def _sync(*files: Any) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def open_store(folder: Path) -> Store:
    """A folder that `write` made. UserError where it is none, or was made by another version, or lacks something."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"`{folder}` holds no packed examples: {fault(error)}", hint="make it with `mbtrain pack`") from error
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise UserError(f"`{folder}` was made by another version of `mbtrain pack`", hint="make it again")
    store = Store(folder, about)
    _check_whole(store)
    return store


def _check_whole(store: Store) -> None:
    tokens, about = store.about["tokens"], store.about
    expected = {_TOKENS: tokens * np.dtype(about["dtype"]).itemsize, _TRAINED: -(-tokens // 8)}
    for name, size in expected.items():
        path = store.folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise UserError(f"`{path}` has {found} bytes, but `{ABOUT}` says {size}", hint="make the folder again")


def is_store(path: Path) -> bool:
    """Is this a folder of examples that are tokens already?"""
    return (path / ABOUT).is_file() and (path / OFFSETS).is_file()


def kept(
    folder: Path,
    name: str,
    examples: Callable[[], Iterable[Tokenized]],
    *,
    vocab_size: int,
    about: Callable[[], Mapping[str, Any]],
) -> Store:
    """The store `folder / name`, made of what `examples()` gives where it is not there yet. See `trainer.data.cache`."""
    whole = folder / name
    if not is_store(whole):
        cache.put(whole, lambda partial: write(partial, examples(), vocab_size=vocab_size, about=about))
    return open_store(whole)
