"""From the segments of packed rows to what attention must know of them. Knows tensors; knows neither files nor models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

PADDING = -1
"""The segment of what fills a row up. It is one like any other to attention, and no work that counts."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the segments of a microbatch begin and end, its rows laid end to end."""

    bounds: np.ndarray
    """int32 `[segments + 1]`, from 0 to micro batch × sequence."""

    tokens: int
    """Tokens in segments that are not padding."""

    squares: int
    """The sum of the squares of the lengths of those segments."""

    @property
    def longest(self) -> int:
        """Tokens in the longest segment, padding included."""
        return int(np.diff(self.bounds).max())


def find(segment_ids: torch.Tensor) -> Segments:
    """The segments of `segment_ids`, `[micro batch, sequence]` on the CPU: equal numbers side by side in one row."""
    rows = segment_ids.numpy()
    begins = np.ones(rows.shape, bool)
    begins[:, 1:] = rows[:, 1:] != rows[:, :-1]
    (starts,) = np.nonzero(begins.reshape(-1))
    lengths = np.diff(starts, append=rows.size)
    counted = lengths[rows.reshape(-1)[starts] != PADDING].astype(np.int64)
    bounds = np.append(starts, rows.size).astype(np.int32)
    return Segments(bounds, int(counted.sum()), int((counted**2).sum()))


def of_documents(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """A segment for each document in `tokens`, `[sequence]`, its end included; int32."""
    ends = (tokens == eod).int()
    return (ends.cumsum(0) - ends).to(torch.int32)


def mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Which pairs attention leaves out, `[micro batch, 1, sequence, sequence]`: True where the second token is of another segment
    than the first, or comes after it. As megatron-core's own attention takes it."""
    length = segment_ids.shape[-1]
    others = segment_ids[:, :, None] != segment_ids[:, None, :]
    later = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).triu(1)
    return (others | later)[:, None]
