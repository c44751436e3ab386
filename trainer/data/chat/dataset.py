"""Examples in rows, as the dataset that `trainer.data` describes.

Which examples a sample number stands for depends on the lengths of the examples, the row's length and the seed: each epoch packs
them anew, in another order, and has each example once. Knows a store of tokens, and nothing of what made them.
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


class Tokens(Protocol):
    """Tokenized examples by number: `trainer.data.chat.store.Store`."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        ...

    def __getitem__(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Its tokens, and for each whether it is learned."""
        ...


class Examples(Dataset):
    """The examples `numbers` of a store in rows of `sequence_length`, as many samples as `take` says.

    `packed` puts several into a row. `shuffled` gives every epoch an order of its own; without it all are alike, as evaluation
    wants them. `rows` are rows composed before, whose order alone changes. Longer examples are cut.
    """

    def __init__(
        self,
        store: Tokens,
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
        """What to tell of it before the first step."""

        self.sequence_length, self.packed, self._multiple = sequence_length, packed, multiple
        self._seed, self._shuffled = seed, shuffled
        self.samples = 0
        self._lengths = np.minimum(store.lengths[numbers], sequence_length).astype(np.int64)
        self._taken = packing.padded(self._lengths, multiple=multiple) if packed else self._lengths
        self._opened: dict[int, Rows] = {}
        self._ends = [len(self._epoch(0))]
        """Samples until the end of each epoch that was packed."""

    def take(self, samples: int) -> Examples:
        """Have so many samples, and know where the epochs end that they lie in."""
        self.samples = samples
        while self._ends[-1] < samples and self._every_epoch_differs:
            self._pack_next()
        return self

    @property
    def per_epoch(self) -> int:
        """Samples of the first epoch; others may have a few more or less where rows are packed anew."""
        return self._ends[0]

    def until(self, epochs: int) -> int:
        """Samples until the end of that many epochs."""
        if not self._every_epoch_differs:
            return epochs * self._ends[0]
        while len(self._ends) < epochs:
            self._pack_next()
        return self._ends[epochs - 1]

    def _pack_next(self) -> None:
        self._ends.append(self._ends[-1] + len(self._epoch(len(self._ends))))

    @property
    def efficiency(self) -> float:
        """The share of the first epoch's rows that is tokens of examples."""
        return packing.efficiency(self._lengths, self._ends[0], capacity=self.sequence_length)

    def fingerprint(self) -> str:
        """A hash of what it reads (`trainer.data.consistency`): all lengths, the tokens of some examples, and the first row."""
        some = [part for number in consistency.spread(len(self._numbers)) for part in self.store[int(self._numbers[number])]]
        return consistency.fingerprint(self._lengths, *some, *([self[0]["labels"].numpy()] if self.samples else []))

    def beginnings(self, count: int) -> list[list[int]]:
        """The tokens of the first examples before those that are learned."""
        found = (self.store[number] for number in self._numbers[:count].tolist())
        return [words[: max(int(trained.argmax()), 1)].tolist() for words, trained in found]

    @property
    def _every_epoch_differs(self) -> bool:
        """In how many rows it has."""
        return self._shuffled and self.packed and self._rows is None

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.samples:
            raise IndexError(index)
        epoch, row = self._place(int(index))
        return self._row(self._numbers[self._epoch(epoch)[row]])

    def _place(self, sample: int) -> tuple[int, int]:
        """Its epoch, and its row there."""
        if not self._every_epoch_differs:
            return divmod(sample, self._ends[0])
        epoch = bisect_right(self._ends, sample)
        return epoch, sample - (self._ends[epoch - 1] if epoch else 0)

    def _epoch(self, number: int) -> Rows:
        """Only two are held: samples are read nearly in order."""
        number = number if self._shuffled else 0
        if number not in self._opened:
            if len(self._opened) == 2:
                del self._opened[next(iter(self._opened))]
            self._opened[number] = self._composed(number)
        return self._opened[number]

    def _composed(self, epoch: int) -> Rows:
        if self.packed and self._rows is None:
            return self._packed(epoch)
        rows = self._rows or packing.singly(len(self._lengths))
        return rows.permuted(packing.draw(self._seed, epoch).permutation(len(rows))) if self._shuffled else rows

    def _packed(self, epoch: int) -> Rows:
        """From a file where there are so many examples that packing takes a while."""

        def make() -> cache.Arrays:
            if self._shuffled:
                rows = packing.shuffled(self._taken, capacity=self.sequence_length, seed=self._seed, epoch=epoch)
            else:
                rows = packing.in_order(self._taken, capacity=self.sequence_length)
            return rows.examples, rows.starts

        if self._folder is None:
            return Rows(*make())
        return Rows(*cache.kept(self._folder, self._name(epoch), _EFFORT * len(self._taken), make))

    def _name(self, epoch: int) -> str:
        """Of the file: all that decides an epoch's rows."""
        decides = f"{self.sequence_length} {self._seed if self._shuffled else None} {epoch}"
        return f"rows-{blake3.blake3(self._taken.tobytes() + decides.encode()).hexdigest()[:32]}"

    def _row(self, examples: np.ndarray) -> dict[str, torch.Tensor]:
        """One sample, `[sequence_length]` each: a token is followed by its label, but for an example's last, which has none."""
        length = self.sequence_length
        tokens, labels, positions = (np.zeros(length, np.int64) for _ in range(3))
        learned, segments = np.zeros(length, np.float32), np.full(length, PADDING, np.int32)
        start = 0
        for segment, example in enumerate(examples.tolist()):
            words, trained = (part[:length] for part in self.store[example])
            end, last = start + len(words), start + len(words) - 1
            tokens[start:end], labels[start:last], learned[start:last] = words, words[1:], trained[1:]
            after = start + int(packing.padded(np.int64(len(words)), multiple=self._multiple)) if self.packed else end
            positions[start:after], segments[start:after] = np.arange(after - start), segment
            start = after
        positions[start:] = np.arange(length - start)
        made = {"tokens": tokens, "labels": labels, "position_ids": positions, "loss_mask": learned}
        made |= {"segment_ids": segments} if self.packed else {}
        return {name: torch.from_numpy(array) for name, array in made.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}


_EFFORT = 16
"""Packing an example takes as long as so many entries of an index."""
