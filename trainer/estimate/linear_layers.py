"""Count the bytes that linear layers and their adapters keep for the backward pass, on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.estimate.adapters import Linear, adapter_of

STATISTICS = 4
"""Bytes per token and norm or head that fp32 statistics take: a norm's deviation, a softmax's sum."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How ranks divide a token's channels, the width of a channel, and what is trained."""

    tp: int
    etp: int
    shards: int
    """Ranks that divide the tokens of norms and residuals: sequence parallelism."""

    wide: int
    """Bytes of one channel."""

    narrow: int
    """Bytes of one channel of a matrix product's input: FP8 keeps it quantized."""

    projection: int
    """Bytes of one channel of attention's output that the projection keeps, beside those that attention keeps."""

    scores: int
    """Tokens of one row of the matrix of scores; 0 with flash attention."""

    logit: int = 0
    """Bytes of a router's logit, whose adapter is multiplied in that precision."""

    pairs: float = 0.0
    """Pairs of a token and an expert that a rank computes, for each token before ranks divide them."""

    peft: Any = None
    """None where all weights are trained."""


def by_linear(linear: Linear, layout: Layout, ranks: int, *, normed: bool = False, shared: bool = False) -> tuple[int, int]:
    """Return the bytes per token that a linear layer keeps of its input, and those that its adapter keeps.

    A layer keeps its input for its weight's gradient: in FP8 quantized, frozen not at all. An adapter's A keeps it as it is, or
    what dropout makes of it, with a mask. Transformer Engine's layer with a norm in it (`normed`) that hands out what the norm
    made keeps that too, though a frozen one has no use for it: quantized, or the same tensor. `shared` is kept by attention
    anyway. Then there are A·x, r wide, and the output that a magnitude scales.
    """
    wide, narrow = layout.wide, layout.narrow
    inputs = linear.inputs // (ranks if linear.row else layout.shards)
    if layout.peft is None:
        return (layout.projection if shared else narrow) * inputs, 0
    added = adapter_of(layout.peft, linear, ranks=ranks)
    if added is None:
        return 0, 0
    dropped = layout.peft.dropout > 0
    bytes_per_input = (0 if shared and not dropped else wide) + dropped
    bytes_per_input += narrow if normed and (dropped or narrow != wide) else 0
    scaled = linear.outputs // (layout.shards if linear.row else ranks) if added.magnitudes else 0
    return bytes_per_input * inputs, wide * (added.rank + scaled)
