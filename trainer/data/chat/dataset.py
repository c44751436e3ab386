"""Make samples from rows of examples: the dataset interface of `trainer.data` over a store of tokenized examples.

Each epoch has each example once, packed again in another order. The examples of a sample number depend on the lengths of the
examples, the sequence length and the seed.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any, Protocol

import blake3
import numpy as np
import torch
from torch.utils.data import Dataset

from trainer.data import cache, consistency
from trainer.data.chat import packing
from trainer.data.chat.packing import Rows
from trainer.segments import PADDING


class TokenStore(Protocol):
    """Tokenized examples by number: `trainer.data.chat.store.Store`."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [examples]."""
        ...

    def __getitem__(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens [length] of an example, and whether each is learned, bool [length]."""
        ...


class ExampleDataset(Dataset):
    """The examples `numbers` of a store in rows of `sequence_length` tokens; `take` sets the number of samples.

    With `packed`, a row has several examples. With `shuffled`, each epoch has its own order; without it all epochs are the same,
    for evaluation. `rows` are rows packed beforehand, of which only the order changes. Longer examples are truncated.
    """

    def __init__(
        self,
        store: TokenStore,
        numbers: np.ndarray,
        *,
        sequence_length: int,
        packed: bool,
        multiple: int = 1,
        seed: int,
        shuffled: bool = True,
        rows: Rows | None = None,
        folder: Path | None = None,
    ) -> None:
        self.store, self._numbers, self._rows, self._folder = store, numbers, rows, folder
        self.summary: tuple[str, ...] = ()
        """Lines to print before the first step."""

        self.sequence_length, self.packed, self._multiple = sequence_length, packed, multiple
        self._seed, self._shuffled = seed, shuffled
        self.samples = 0
        self._lengths = np.minimum(store.lengths[numbers], sequence_length).astype(np.int64)
        self._padded_lengths = packing.pad_lengths(self._lengths, multiple=multiple) if packed else self._lengths
        self._open_epochs: dict[int, Rows] = {}
        self._epoch_ends = [len(self._epoch(0))]
        """The number of samples up to the end of each epoch packed so far."""

    def take(self, samples: int) -> ExampleDataset:
        """Set the length to `samples`, and pack epochs until their ends are known up to there."""
        self.samples = samples
        while self._epoch_ends[-1] < samples and self._repacks:
            self._pack_next()
        return self

    @property
    def per_epoch(self) -> int:
        """Return the samples of the first epoch. Other epochs may have a few more or fewer rows if they are packed again."""
        return self._epoch_ends[0]

    def until(self, epochs: int) -> int:
        """Return the number of samples in `epochs` epochs."""
        if not self._repacks:
            return epochs * self._epoch_ends[0]
        while len(self._epoch_ends) < epochs:
            self._pack_next()
        return self._epoch_ends[epochs - 1]

    def _pack_next(self) -> None:
        self._epoch_ends.append(self._epoch_ends[-1] + len(self._epoch(len(self._epoch_ends))))

    @property
    def efficiency(self) -> float:
        """Return the fraction of the first epoch's rows that is tokens of examples, not padding."""
        return packing.efficiency(self._lengths, self._epoch_ends[0], capacity=self.sequence_length)

    def fingerprint(self) -> str:
        """Return a hash of all lengths, the tokens of some examples, and the first row: see `trainer.data.consistency`."""
        sampled = self._numbers[consistency.spread_indices(len(self._numbers))].tolist()
        parts = [part for number in sampled for part in self.store[number]]
        return consistency.fingerprint(self._lengths, *parts, *([self[0]["labels"].numpy()] if self.samples else []))

    def beginnings(self, count: int) -> list[list[int]]:
        """Return the prompts of the first `count` examples: their tokens before the first learned one."""
        examples = (self.store[number] for number in self._numbers[:count].tolist())
        return [tokens[: max(int(trained.argmax()), 1)].tolist() for tokens, trained in examples]

    @property
    def _repacks(self) -> bool:
        """Return whether each epoch is packed again, and so may have another number of rows."""
        return self._shuffled and self.packed and self._rows is None

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.samples:
            raise IndexError(index)
        epoch, row = self._locate(int(index))
        return self._make_sample(self._numbers[self._epoch(epoch)[row]])

    def _locate(self, sample: int) -> tuple[int, int]:
        """Return the epoch of a sample, and its row in that epoch."""
        if not self._repacks:
            return divmod(sample, self._epoch_ends[0])
        epoch = bisect_right(self._epoch_ends, sample)
        return epoch, sample - (self._epoch_ends[epoch - 1] if epoch else 0)

    def _epoch(self, number: int) -> Rows:
        """Return the rows of an epoch. Two epochs are kept: samples are read nearly in order."""
        number = number if self._shuffled else 0
        if number not in self._open_epochs:
            if len(self._open_epochs) == 2:
                del self._open_epochs[next(iter(self._open_epochs))]
            self._open_epochs[number] = self._compose(number)
        return self._open_epochs[number]

    def _compose(self, epoch: int) -> Rows:
        if self.packed and self._rows is None:
            return self._packed_rows(epoch)
        rows = self._rows or packing.one_per_row(len(self._lengths))
        return rows.permuted(packing.epoch_generator(self._seed, epoch).permutation(len(rows))) if self._shuffled else rows

    def _packed_rows(self, epoch: int) -> Rows:
        """Pack an epoch, or read it from the cache if there are many examples."""
        lengths, capacity = self._padded_lengths, self.sequence_length

        def make() -> cache.Arrays:
            if self._shuffled:
                rows = packing.best_fit_shuffled(lengths, capacity=capacity, seed=self._seed, epoch=epoch)
            else:
                rows = packing.best_fit_in_order(lengths, capacity=capacity)
            return rows.examples, rows.starts

        if self._folder is None:
            return Rows(*make())
        return Rows(*cache.cached_arrays(self._folder, self._cache_name(epoch), _PACKING_COST * len(self._padded_lengths), make))

    def _cache_name(self, epoch: int) -> str:
        """Return the name of the cached rows: a hash of everything that they depend on."""
        settings = f"{self.sequence_length} {self._seed if self._shuffled else None} {epoch}"
        return f"rows-{blake3.blake3(self._padded_lengths.tobytes() + settings.encode()).hexdigest()[:32]}"

    def _make_sample(self, examples: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the tensors of a sample, each [sequence_length]. The label of a token is the next token of the same example; the
        last token of an example has none."""
        length = self.sequence_length
        tokens, labels, positions = (np.zeros(length, np.int64) for _ in range(3))
        learned, segments = np.zeros(length, np.float32), np.full(length, PADDING, np.int32)
        start = 0
        for segment, example in enumerate(examples.tolist()):
            words, trained = (part[:length] for part in self.store[example])
            end, last = start + len(words), start + len(words) - 1
            tokens[start:end], labels[start:last], learned[start:last] = words, words[1:], trained[1:]
            after = start + int(packing.pad_lengths(np.int64(len(words)), multiple=self._multiple)) if self.packed else end
            positions[start:after], segments[start:after] = np.arange(after - start), segment
            start = after
        positions[start:] = np.arange(length - start)
        arrays = {"tokens": tokens, "labels": labels, "position_ids": positions, "loss_mask": learned}
        arrays |= {"segment_ids": segments} if self.packed else {}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the opened epochs; the receiving process makes or maps those that it reads."""
        return {**self.__dict__, "_open_epochs": {}}


_PACKING_COST = 16
"""Packing one example takes about as long as computing this many entries of an index."""
