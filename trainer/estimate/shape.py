"""The numbers of a GPT-shaped model that operations and activations follow from, whether or not its provider is finalized yet.

Knows no layout, no precision and no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.utils import is_layer_window_attention

from formats.errors import UserError


@dataclass(frozen=True, slots=True)
class Shape:
    """A model. Sizes are of whole tensors, before ranks divide them."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head: int
    ffn: int
    gates: int
    """Matrices of the feed-forward network that read the hidden state: 2 with a gated unit, else 1."""

    vocab: int
    padded_vocab: int
    windows: tuple[int | None, ...]
    """Layer by layer: tokens that a token sees, itself included; None for all before it."""

    experts: tuple[bool, ...]
    """Layer by layer: does it have experts?"""

    num_experts: int
    active_experts: int
    expert_ffn: int
    shared_ffn: int

    @property
    def queries(self) -> int:
        """Channels of the queries, and of the attention's output."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """Channels of the keys; the values have as many."""
        return self.groups * self.head

    @property
    def attention_matrices(self) -> int:
        """Weights of one layer's attention that are multiplied with."""
        return self.hidden * (self.queries + 2 * self.keys) + self.queries * self.hidden

    def mlp_matrices(self, ffn: int) -> int:
        """Weights of one feed-forward network of inner size `ffn`."""
        return (self.gates + 1) * self.hidden * ffn


_UNLIKE = (
    "multi_latent_attention",
    "experimental_attention_variant",
    "mtp_num_layers",
    "heterogeneous_block_specs",
    "is_hybrid_model",
)


def shape_of(provider: Any) -> Shape:
    """A provider's shape. UserError for what is not GPT-shaped: its operations and sizes follow other formulas."""
    try:
        return _shape(provider)
    except AttributeError as error:
        raise UserError(
            f"no formula for the size of a `{type(provider).__name__}`: it has no `{error.name}`",
            hint="only models with the fields of `GPTModelProvider` are counted",
        ) from error


def _shape(provider: Any) -> Shape:
    for name in _UNLIKE:
        if getattr(provider, name, None):
            raise UserError(
                f"no formula for the size of a model with `{name}`: `{getattr(provider, name)}`",
                hint="only models with plain attention and feed-forward layers or experts are counted",
            )
    heads, hidden = provider.num_attention_heads, provider.hidden_size
    if not heads or not hidden:  # a provider of the user's own need not say
        raise UserError(
            f"no formula for the size of a `{type(provider).__name__}`: its `num_attention_heads` is `{heads}`",
            hint="only models with the fields of `GPTModelProvider` are counted",
        )
    ffn = provider.ffn_hidden_size or 4 * hidden
    experts = provider.num_moe_experts or 0
    return Shape(
        layers=provider.num_layers,
        hidden=hidden,
        heads=heads,
        groups=provider.num_query_groups or heads,
        head=provider.kv_channels or hidden // heads,
        ffn=ffn,
        gates=2 if provider.gated_linear_unit else 1,
        vocab=provider.vocab_size,
        padded_vocab=provider.padded_vocab_size,
        windows=_windows(provider),
        experts=_layers_with_experts(provider),
        num_experts=experts,
        active_experts=provider.moe_router_topk if experts else 0,
        expert_ffn=(provider.moe_ffn_hidden_size or ffn) if experts else 0,
        shared_ffn=(provider.moe_shared_expert_intermediate_size or 0) if experts else 0,
    )


def _layers_with_experts(provider: Any) -> tuple[bool, ...]:
    """megatron-core's `moe_layer_freq`: every nth layer from the first on, or a list."""
    if not provider.num_moe_experts:
        return (False,) * provider.num_layers
    frequency = provider.moe_layer_freq
    if isinstance(frequency, int):
        return tuple(layer % frequency == 0 for layer in range(provider.num_layers))
    return tuple(bool(has_experts) for has_experts in frequency)


def _windows(provider: Any) -> tuple[int | None, ...]:
    window, skipped = provider.window_size, provider.window_attn_skip_freq
    in_window = (is_layer_window_attention(window, skipped, layer + 1) for layer in range(provider.num_layers))
    return tuple(window[0] + 1 if windowed else None for windowed in in_window)
