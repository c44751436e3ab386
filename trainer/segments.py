"""Find the segments of packed rows, and the attention mask that keeps them apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

PADDING = -1
"""The segment id of padding. Attention treats padding as a segment of its own; it is left out of the work that is counted."""


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of a microbatch whose rows are concatenated."""

    cu_seqlens: np.ndarray
    """Cumulative lengths, int32 [segments + 1], from 0 to micro batch × sequence."""

    num_tokens: int
    """Tokens in segments that are not padding."""

    sum_squared_lengths: int
    """The sum over those segments of length²."""

    @property
    def max_seqlen(self) -> int:
        """Return the tokens of the longest segment, padding included."""
        return int(np.diff(self.cu_seqlens).max())


def find_segments(segment_ids: torch.Tensor) -> Segments:
    """Return the runs of equal ids in each row of `segment_ids` [micro batch, sequence], which is on the CPU.

    >>> segments = find_segments(torch.tensor([[0, 0, 1, -1], [0, 0, 0, 0]]))
    >>> segments.cu_seqlens.tolist(), segments.num_tokens, segments.sum_squared_lengths, segments.max_seqlen
    ([0, 2, 3, 4, 8], 7, 21, 4)
    """
    rows = segment_ids.numpy()
    begins = np.ones(rows.shape, bool)
    begins[:, 1:] = rows[:, 1:] != rows[:, :-1]
    (starts,) = np.nonzero(begins.reshape(-1))
    lengths = np.diff(starts, append=rows.size)
    counted = lengths[rows.reshape(-1)[starts] != PADDING].astype(np.int64)
    cu_seqlens = np.append(starts, rows.size).astype(np.int32)
    return Segments(cu_seqlens, int(counted.sum()), int((counted**2).sum()))


def document_segment_ids(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """Return the document number of each of `tokens` [sequence], int32; an end-of-document token belongs to its document.

    >>> document_segment_ids(torch.tensor([5, 0, 6, 7, 0, 8]), eod=0).tolist()
    [0, 0, 1, 1, 1, 2]
    """
    ends = (tokens == eod).int()
    return (ends.cumsum(0) - ends).to(torch.int32)


def attention_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Return the mask [micro batch, 1, sequence, sequence] in megatron-core's convention: True, so masked, if the key is in
    another
    segment than the query or comes after it.

    >>> attention_mask(torch.tensor([[0, 0, 1]])).int()[0, 0].tolist()
    [[0, 1, 1], [0, 0, 1], [1, 1, 0]]
    """
    length = segment_ids.shape[-1]
    others = segment_ids[:, :, None] != segment_ids[:, None, :]
    later = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).triu(1)
    return (others | later)[:, None]
