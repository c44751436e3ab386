"""Count the bytes that what mixes a layer's tokens keeps for the backward pass: attention, Mamba-2, gated delta nets.

Of states, what a GPU's kernels keep: those of mamba_ssm (`MambaSplitConv1dScanCombinedFn`) and of flash-linear-attention
(`ChunkGatedDeltaRuleFunction`), which compute states again. They were read, not measured. Plain torch, on a CPU, keeps more: the
matrices of each chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

from formats.errors import UserError
from trainer.estimate.adapters import Linear
from trainer.estimate.linear_layers import STATISTICS, Layout, by_linear
from trainer.estimate.mixers import Recurrence
from trainer.estimate.shape import Kind, Shape

SCORE_COPIES = 2
"""Matrices of scores that attention without flash keeps: before and after the softmax."""

CHUNK = 64
"""Tokens of a chunk of the gated delta rule, which keeps a matrix of each with itself (flash-linear-attention)."""


def check(shape: Shape) -> None:
    """Raise UserError for sparse attention: what its kernels keep was not looked into."""
    if any(kind.indexer for kind in shape.kinds):
        raise UserError("no formula for what sparse attention keeps for the backward pass")


def by_mixing(shape: Shape, kind: Kind, linears: Sequence[Linear], layout: Layout) -> tuple[int, dict[str, int]]:
    """Return the bytes per token of what the layers that mix tokens read, and of the rest by module that can be recomputed on its
    own. `linears` are these layers, the output projection last; none in a feed-forward layer of a hybrid."""
    if kind.attends:
        return _attention(shape, linears, layout)
    if kind.recurrence is None:
        return 0, {}
    projection, output = linears
    into, of_projection = by_linear(projection, layout, layout.tp, normed=True)
    into_output, of_output = by_linear(output, layout, layout.tp)
    inside, normed = (_mamba if kind.recurrence.is_mamba else _delta_net)(kind.recurrence, layout)
    return into, {"attention": inside + of_projection + of_output, "gdn_norm_out": normed + into_output}


def _mamba(mixer: Recurrence, layout: Layout) -> tuple[int, int]:
    """Return the bytes per token of what `in_proj` makes, of the kernel's output before the gate and after it, which the norm of
    each group reads; and nothing of a delta net's norm."""
    return (layout.wide * (mixer.projected + 2 * mixer.inner) + STATISTICS * mixer.key_heads) // layout.tp, 0


def _delta_net(net: Recurrence, layout: Layout) -> tuple[int, int]:
    """Return the bytes per token of a delta net, and of what its norm makes, which is multiplied by the gate.

    Kept are the convolution's input, gate, step and decay; the kernel's query, key, value, step, decay in fp32 and matrix of a
    chunk, and its output. Queries and keys are normed, then repeated for the heads of values.
    """
    keys = 2 * net.key * (net.key_heads + (net.heads if net.heads != net.key_heads else 0))
    channels = net.convolved + keys + 3 * net.inner + (3 + CHUNK) * net.heads
    in_fp32 = 2 * net.heads + 2 * net.key_heads  # decays, and deviations of norms
    return (layout.wide * channels + STATISTICS * in_fp32) // layout.tp, layout.wide * net.inner // layout.tp


def _attention(shape: Shape, linears: Sequence[Linear], layout: Layout) -> tuple[int, dict[str, int]]:
    """Return what `by_mixing` does, for a layer of attention, plain or latent."""
    wide, tp = layout.wide, layout.tp
    *readers, projection = linears
    into, up_projections, of_adapters = (_latent if shape.latent else _plain)(shape, readers, layout)
    # A gate makes another tensor of what attention keeps.
    into_projection, of_projection = by_linear(projection, layout, tp, shared=not shape.gated)
    channels = wide * (shape.gated_queries + shape.keys + shape.values + shape.normed) // tp
    attended = wide * shape.attended // tp
    return into, {
        "attention": attended + into_projection + of_adapters + of_projection + (0 if shape.latent else channels),
        "mla_up_proj": up_projections + channels if shape.latent else 0,
        "core_attn": STATISTICS * shape.heads // tp + SCORE_COPIES * wide * shape.heads * layout.scores // tp,
    }


def _plain(_shape: Shape, readers: Sequence[Linear], layout: Layout) -> tuple[int, int, int]:
    """Return the bytes per token of what attention reads, of what its up-projections keep, which are none, and of its adapter."""
    into, of_adapter = by_linear(readers[0], layout, layout.tp, normed=True)
    return into, 0, of_adapter


def _latent(shape: Shape, readers: Sequence[Linear], layout: Layout) -> tuple[int, int, int]:
    """Return the bytes per token of what latent attention reads, of its up-projections, and of its adapters.

    Two layers read the same norm of the hidden state; each keeps a quantized copy of its own. Up-projections keep what a norm
    inside them reads, and what it makes.
    """
    assert shape.latent is not None
    bytes_of_linears = {
        linear.name.rpartition(".")[2]: by_linear(linear, layout, layout.tp, normed="up" in linear.name) for linear in readers
    }
    ups = [name for name in bytes_of_linears if "_up_" in name]
    reading = [bytes_of_linears[name][0] for name in bytes_of_linears if name not in ups]
    into = sum(reading) if layout.narrow != layout.wide else max(reading)
    compressed = shape.latent.query_rank + shape.latent.kv_rank + shape.latent.rotary
    inside = layout.wide * compressed // layout.shards + len(ups) * STATISTICS
    return into, inside + sum(bytes_of_linears[name][0] for name in ups), sum(added for _, added in bytes_of_linears.values())
