"""Several streams of samples as one, in fixed proportions, as megatron-core mixes them.

megatron-core takes each sample from the dataset that is furthest behind its share, so a longer blend begins with the shorter one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.utils import normalize
from torch.utils.data import Dataset

from trainer.data import cache, consistency
from trainer.data.interface import SampleStream


class Blend(Dataset):
    """`samples` samples of `sources`, which give as many as their `weights` say."""

    def __init__(self, sources: Sequence[SampleStream], weights: list[float], *, samples: int, folder: Path) -> None:
        self._sources, self._weights, self.samples, self._folder = sources, normalize(weights), samples, folder
        self.summary: tuple[str, ...] = ()
        """What to tell of it before the first step."""

        self._indices: cache.Arrays | None = None
        which, _ = self._mapped()
        for source, count in zip(sources, np.bincount(which, minlength=len(sources)).tolist(), strict=True):
            source.take(count)

    def fingerprint(self) -> str:
        """A hash of what it reads: see `trainer.data.consistency`."""
        which, _ = self._mapped()
        return consistency.fingerprint(which[:1024], *(source.fingerprint().encode() for source in self._sources))

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.samples:
            raise IndexError(index)
        which, position = self._mapped()
        return self._sources[which[index]][position[index]]

    def _mapped(self) -> cache.Arrays:
        if self._indices is None:
            said = json.dumps(["blend", self._weights, self.samples])
            name = hashlib.sha256(said.encode()).hexdigest()[:32]
            self._indices = cache.kept(self._folder, name, self.samples, self._made)
        return self._indices

    def _made(self) -> cache.Arrays:
        """Which source each sample comes from, and which sample of that source it is."""
        which, position = np.zeros(self.samples, np.int16), np.zeros(self.samples, np.int64)
        helpers.build_blending_indices(which, position, self._weights, len(self._weights), self.samples, False)
        return which, position

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": None}
