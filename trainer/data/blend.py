"""Mix several streams of samples into one, in fixed proportions, in megatron-core's order.

megatron-core takes each sample from the stream that is furthest behind its weight, so a longer blend begins with a shorter one.
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
    """`samples` samples from `sources`, in proportion to `weights`."""

    def __init__(self, sources: Sequence[SampleStream], weights: list[float], *, samples: int, folder: Path) -> None:
        self._sources, self._weights, self.samples, self._folder = sources, normalize(weights), samples, folder
        self.summary: tuple[str, ...] = ()
        """Lines to print before the first step."""

        self._indices: cache.Arrays | None = None
        source_of, _ = self._index_arrays()
        for source, count in zip(sources, np.bincount(source_of, minlength=len(sources)).tolist(), strict=True):
            source.take(count)

    def fingerprint(self) -> str:
        """Return a hash of the data; `trainer.data.consistency` compares it among ranks."""
        source_of, _ = self._index_arrays()
        return consistency.fingerprint(source_of[:1024], *(source.fingerprint().encode() for source in self._sources))

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.samples:
            raise IndexError(index)
        source_of, position = self._index_arrays()
        return self._sources[source_of[index]][position[index]]

    def _index_arrays(self) -> cache.Arrays:
        """Return, for each sample, its source (int16 [samples]) and its number in that source (int64 [samples])."""
        if self._indices is None:
            key = json.dumps(["blend", self._weights, self.samples])
            name = hashlib.sha256(key.encode()).hexdigest()[:32]
            self._indices = cache.cached_arrays(self._folder, name, self.samples, self._build_index_arrays)
        return self._indices

    def _build_index_arrays(self) -> cache.Arrays:
        source_of, position = np.zeros(self.samples, np.int16), np.zeros(self.samples, np.int64)
        helpers.build_blending_indices(source_of, position, self._weights, len(self._weights), self.samples, False)
        return source_of, position

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped indices, which pickle would copy; the receiving process maps them itself."""
        return {**self.__dict__, "_indices": None}
