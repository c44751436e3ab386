"""Count model FLOPs per token, independent of hardware and layout: recomputed activations and padded vocabulary are not
counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.estimate import adapters
from trainer.estimate.shape import Kind, Shape, shape_of

if TYPE_CHECKING:
    from trainer.config import RunConfig


def flops_per_token(provider: Any, sequence_length: int, *, lengths: Sequence[float] | None = None, peft: Any = None) -> float:
    """Return the floating-point operations of forward and backward pass per token, on sequences of `sequence_length` tokens, or
    packed ones of the given `lengths`.

    3 × forward, as backward multiplies twice as much (Narayanan et al. 2021, arXiv:2104.04473, appendix). Forward, per token:

    - 2 × every weight that is multiplied with: attention, feed-forward network (the experts a token is sent to, the shared
      one, the router) and output layer with the vocabulary's own size, not padded. The input embedding is looked up. A layer of
      multi-token prediction is a layer, a projection of the hidden state and an embedding, and the output layer once more.
    - 2 × heads × (channels of a key + channels of a value) × the tokens that a token sees on average, in each layer: queries
      times keys, and scores times values. Causal attention sees half a sequence, s/2; Σ s²/2 ÷ Σ s over packed sequences; a
      sliding window less, and sparse attention the tokens it chooses.
    - Of Mamba-2 and gated delta nets, 7 and 8 operations for every number of a token's states, which do not depend on the
      sequence's length (`trainer.estimate.mixers` has the sources); and 2 × the weights of their convolution.
    - Of an indexer of sparse attention, 2 × its weights, and 2 × heads × channels × the tokens before; forward alone where it
      has no loss (`dsa_indexer_loss_coeff`).

    With `peft` the model's weights are frozen: 2 × forward for them, as gradients pass through but none is theirs; 3 × forward
    for attention's scores, which have no weights; and 3 × 2 × every weight of an adapter's A and B. Layers before the first with
    an adapter are not gone back through: 1 × forward. What a method of the user's own adds is not counted.

    Raises UserError for a model of another kind.
    """
    shape, lengths = shape_of(provider), lengths or (sequence_length,)
    mixed = [_mixed(shape, kind, lengths) for kind in shape.kinds]
    choosing = [_chosen(shape, kind, lengths, trained=peft is None) for kind in shape.kinds]
    if peft is None:
        return 3 * (2 * _multiplied(shape) + sum(mixed)) + sum(choosing)
    first = adapters.first_trained(peft, shape)
    return (
        2 * (_multiplied(shape) + _multiplied(shape, first))
        + sum(mixed)
        + 2 * sum(mixed[first:])
        + sum(choosing)
        + 6 * adapters.multiplied_weights(peft, shape)
    )


def flops_of_run(config: RunConfig) -> float:
    """Return the floating-point operations per token of a run, on whole sequences."""
    return flops_per_token(config.model, config.dataset.sequence_length, peft=config.peft)


def flops_of_packed(provider: Any, tokens: float, squares: float, *, peft: Any = None) -> float:
    """Return the floating-point operations of forward and backward pass over packed examples of `tokens` tokens in all, Σ sᵢ,
    whose lengths' squares sum up to `squares`, Σ sᵢ². Exact but for sliding windows: for those, as if all were of one
    length."""
    return tokens * flops_per_token(provider, 0, lengths=(squares / tokens,), peft=peft)


def _multiplied(shape: Shape, first: int = 0) -> int:
    """Return the weights that one token is multiplied with, from layer `first` on."""
    layers = sum(_weights(shape, kind) for kind in shape.kinds[first:])
    return layers + shape.hidden * shape.vocab + shape.mtp * (2 * shape.hidden**2 + shape.hidden * shape.vocab)


def _weights(shape: Shape, kind: Kind) -> int:
    """Return the weights of a layer that one token is multiplied with, without an indexer's."""
    mixing = kind.recurrence.weights(shape.hidden) if kind.recurrence else shape.attention_matrices if kind.attends else 0
    return mixing + (shape.expert_matrices if kind.experts else shape.mlp_matrices(shape.ffn) if kind.dense else 0)


def _mixed(shape: Shape, kind: Kind, lengths: Sequence[float]) -> float:
    """Return the forward operations per token of a layer that have no weights: of scores and values, or of states."""
    if kind.recurrence:
        return kind.recurrence.operations
    return 2 * shape.heads * (shape.head + shape.value) * _seen(lengths, kind.window) if kind.attends else 0


def _chosen(shape: Shape, kind: Kind, lengths: Sequence[float], *, trained: bool) -> float:
    """Return the operations per token of a layer's indexer, backward too if it is trained, which scores all tokens before."""
    if kind.indexer is None:
        return 0
    of_scores = kind.indexer.heads * kind.indexer.head * _seen(lengths, None)
    return (3 if trained and kind.indexer.is_trained else 1) * 2 * (kind.indexer.weights(shape.hidden) + of_scores)


def _seen(lengths: Sequence[float], window: int | None) -> float:
    """Return the tokens that a token attends to on average in one layer: the area under the diagonal and inside the window."""
    area = sum(length**2 - max(0, length - (window or length)) ** 2 for length in lengths) / 2
    return area / sum(lengths)
