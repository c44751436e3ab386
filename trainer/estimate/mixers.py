"""Sizes of what mixes a layer's tokens instead of plain attention: Mamba-2, gated delta nets, and the indexer of sparse
attention. All are of whole tensors, before ranks divide them.

A state's operations are those of its recurrence, token by token, which is also how Megatron-LM's and Megatron-Bridge's FLOPs
count them: kernels multiply whole chunks of tokens, more or less often by the size of a chunk, for the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.experimental_attention_variant.dsa import is_dsa_skip_topk_layer

from trainer.layers.pattern import GATED_DELTA_NET, layers_with_delta_nets
from trainer.layers.sparse_attention import SPARSE

CONVOLUTION = 4
"""Tokens of Mamba's convolution in megatron-core, which has no setting for it."""

VARIANTS = (None, GATED_DELTA_NET, SPARSE)
"""Values of `experimental_attention_variant` that there are formulas for."""


@dataclass(frozen=True, slots=True)
class Recurrence:
    """A layer that mixes tokens by states of heads, each [channels of a key, channels of a value]."""

    name: str
    """Its name in a layer, in megatron-core."""

    projected: int
    """Outputs of `in_proj`."""

    inner: int
    """Inputs of `out_proj`: the values of all heads."""

    heads: int
    key: int
    """Channels of a head's key, which Mamba-2 calls states."""

    key_heads: int
    """Heads that have a key and a query of their own, which Mamba-2 calls groups."""

    kernel: int
    """Tokens that the convolution of each channel sees."""

    each: int
    """Operations per token and number of the states."""

    @property
    def convolved(self) -> int:
        """Channels that are convolved: queries, keys and values."""
        return 2 * self.key_heads * self.key + self.inner

    @property
    def is_mamba(self) -> bool:
        """Whether it is Mamba-2, not a gated delta net."""
        return self.name == "mixer"

    def weights(self, hidden: int) -> int:
        """Return the weights that one token is multiplied with."""
        return hidden * (self.projected + self.inner) + self.kernel * self.convolved

    @property
    def operations(self) -> int:
        """Operations per token that have no weights: those of the states."""
        return self.each * self.inner * self.key


@dataclass(frozen=True, slots=True)
class Indexer:
    """What chooses the tokens that each token attends to."""

    heads: int
    head: int
    reads: int
    """Channels that its queries are projected from."""

    is_trained: bool
    """Has it a loss? No other gradient reaches it."""

    def weights(self, hidden: int) -> int:
        """Return the weights that one token is multiplied with: of queries, of the one key, of the heads' weights."""
        return self.reads * self.heads * self.head + hidden * (self.head + self.heads)


def mamba(provider: Any) -> Recurrence:
    """Return the sizes of a Mamba-2 layer (`megatron.core.ssm.mamba_mixer`).

    7 operations per number of a state, as `mamba_layer_flops` of Megatron-LM and Megatron-Bridge counts them. The published
    recurrence has 5 of them: the decay, the product of value and key and its sum, the product with the query and its sum.
    """
    heads = provider.mamba_num_heads or 2 * provider.hidden_size // provider.mamba_head_dim
    inner, groups, states = heads * provider.mamba_head_dim, provider.mamba_num_groups, provider.mamba_state_dim
    projected = 2 * inner + 2 * groups * states + heads
    return Recurrence("mixer", projected, inner, heads, states, groups, CONVOLUTION, each=7)


def delta_net(provider: Any) -> Recurrence:
    """Return the sizes of a gated delta net (`megatron.core.ssm.gated_delta_net`).

    8 operations per number of a state, as in Megatron-LM's FLOPs: four products, of a key with itself, of it with the state, of
    a value with a key, and of the state with a query. There the numbers of a state are a value's channels squared.
    """
    keys, heads = provider.linear_num_key_heads, provider.linear_num_value_heads
    inner, key = heads * provider.linear_value_head_dim, provider.linear_key_head_dim
    projected = 2 * keys * key + 2 * inner + 2 * heads
    return Recurrence("self_attention", projected, inner, heads, key, keys, provider.linear_conv_kernel_dim, each=8)


def delta_nets(provider: Any) -> tuple[Recurrence | None, ...]:
    """Return the delta net of each layer; None for attention."""
    return tuple(delta_net(provider) if linear else None for linear in layers_with_delta_nets(provider))


def indexers(provider: Any) -> tuple[Indexer | None, ...]:
    """Return the indexer of each layer; None for a layer whose attention is not sparse, or that takes over others' choice."""
    if provider.experimental_attention_variant != SPARSE:
        return (None,) * provider.num_layers
    heads, head, reads = provider.dsa_indexer_n_heads, provider.dsa_indexer_head_dim, provider.q_lora_rank or provider.hidden_size
    indexer = Indexer(heads, head, reads, bool(provider.dsa_indexer_loss_coeff))
    offset, frequency = provider.dsa_indexer_skip_topk_offset, provider.dsa_indexer_topk_freq
    layers = range(1, provider.num_layers + 1)
    return tuple(None if is_dsa_skip_topk_layer(layer, offset, frequency) else indexer for layer in layers)
