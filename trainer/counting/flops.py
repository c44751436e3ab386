"""Model FLOPs per token: the arithmetic that training a model asks for, whatever a run adds or saves.

Knows no hardware and no layout: recomputed activations and padded vocabulary are work of the run, not of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.counting.shape import Shape, shape_of


def flops_per_token(provider: Any, sequence_length: int, *, lengths: Sequence[float] | None = None) -> float:
    """Floating-point operations of forward and backward pass per token, on sequences of `sequence_length` tokens, or packed
    ones of the given `lengths`.

    3 × forward, as backward multiplies twice as much (Narayanan et al. 2021, arXiv:2104.04473, appendix). Forward, per token:

    - 2 × every weight that is multiplied with: attention, feed-forward network (the experts a token is sent to, the shared
      one, the router) and output layer with the vocabulary's own size, not padded. The input embedding is looked up.
    - 4 × heads × head size × the tokens that a token sees on average, in each layer: queries times keys, and scores times values.
      Causal attention sees half a sequence, s/2; Σ s²/2 ÷ Σ s over packed sequences; a sliding window less.

    UserError for a model that is not GPT-shaped.
    """
    shape = shape_of(provider)
    seen = sum(_seen(lengths or (sequence_length,), window) for window in shape.windows)
    attention = 4 * shape.queries * seen
    return 3 * (2 * _multiplied(shape) + attention)


def flops_of_packed(provider: Any, tokens: float, squares: float) -> float:
    """Floating-point operations of forward and backward over packed examples of `tokens` tokens in all, Σ sᵢ, whose lengths'
    squares sum up to `squares`, Σ sᵢ². Exact but for sliding windows: for those, as if all were of one length."""
    return tokens * flops_per_token(provider, 0, lengths=(squares / tokens,))


def _multiplied(shape: Shape) -> int:
    """Weights that one token is multiplied with."""
    dense = shape.mlp_matrices(shape.ffn)
    routed = shape.active_experts * shape.mlp_matrices(shape.expert_ffn) + shape.hidden * shape.num_experts
    routed += shape.mlp_matrices(shape.shared_ffn)
    layers = sum(shape.attention_matrices + (routed if experts else dense) for experts in shape.experts)
    return layers + shape.hidden * shape.vocab


def _seen(lengths: Sequence[float], window: int | None) -> float:
    """Tokens that a token sees on average in one layer: the area under the diagonal, less what lies beyond the window."""
    area = sum(length**2 - max(0, length - (window or length)) ** 2 for length in lengths) / 2
    return area / sum(lengths)
