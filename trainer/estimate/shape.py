"""Return the sizes of a model that operations and activations depend on; its provider need not be finalized.

Knows no layout, no precision and no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.utils import is_layer_window_attention

from formats.errors import UserError
from trainer.estimate.mixers import VARIANTS, Indexer, Recurrence, delta_nets, indexers, mamba
from trainer.layers.pattern import ATTENTION, EXPERTS, MAMBA, MLP, layers_of_each, layers_with_experts
from trainer.layers.sparse_attention import SPARSE


@dataclass(frozen=True, slots=True)
class Latent:
    """Sizes of multi-head latent attention, in channels."""

    query_rank: int
    """What queries are projected from; 0 where they are projected from the hidden state."""

    kv_rank: int
    """What keys and values are projected from."""

    rotary: int
    """Those of a head's query and key that a rotary embedding turns; of the key they are the same in all heads."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What one layer has. A hybrid's layer either mixes tokens or is a feed-forward network."""

    recurrence: Recurrence | None = None
    """What mixes tokens by a state."""

    attends: bool = False
    window: int | None = None
    """Tokens that a token sees at most, itself included; None for all before it. With sparse attention, those it chooses."""

    indexer: Indexer | None = None
    experts: bool = False
    dense: bool = False
    """Has it a feed-forward network without experts?"""

    @property
    def norms(self) -> int:
        """How many norms read the residual."""
        return (self.attends or self.recurrence is not None) + (self.experts or self.dense)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model's whole tensors, before ranks divide them."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head: int
    """Channels of a head's query, and of its key."""

    value: int
    """Channels of a head's value."""

    latent: Latent | None
    gated: bool
    """Are values multiplied by a gate, as wide as queries, that is projected beside them?"""

    normed: int
    """Channels of queries and keys that are normed; of latent attention none, whose norms are inside its projections."""

    ffn: int
    gates: int
    """Matrices of the feed-forward network that read the hidden state: 2 with a gated unit, else 1."""

    biases: bool
    """Do experts, and the other linear layers, have biases?"""

    vocab: int
    padded_vocab: int
    split: bool
    """Are attention and the feed-forward network layers of their own, one after another (HybridModel)? `layers` counts both as
    one."""

    mtp: int
    """Layers of multi-token prediction, each with a transformer layer like the model's last. They are counted after `layers`."""

    kinds: tuple[Kind, ...]
    """Layer by layer, with those of multi-token prediction."""

    num_experts: int
    active_experts: int
    expert_ffn: int
    expert_hidden: int
    """Channels that experts read and write: the hidden state's, or fewer that it is projected to and back from."""

    shared_ffn: int
    shared_gate: bool
    """Is the shared expert's output multiplied by a gate of one channel?"""

    @property
    def all_layers(self) -> int:
        """Transformer layers, with those of multi-token prediction."""
        return self.layers + self.mtp

    @property
    def queries(self) -> int:
        """Channels of the queries."""
        return self.heads * self.head

    @property
    def gated_queries(self) -> int:
        """Channels of the queries and of what attention's output is multiplied by."""
        return self.queries * (1 + self.gated)

    @property
    def keys(self) -> int:
        """Channels of the keys."""
        return self.groups * self.head

    @property
    def values(self) -> int:
        """Channels of the values."""
        return self.groups * self.value

    @property
    def attended(self) -> int:
        """Channels of the attention's output."""
        return self.heads * self.value

    @property
    def projections(self) -> dict[str, tuple[int, dict[str, int]]]:
        """Inputs of each linear layer of attention, and the outputs of each of its parts, by megatron-core's names."""
        output = {"linear_proj": (self.attended, {"": self.hidden})}
        if self.latent is None:
            return {"linear_qkv": (self.hidden, {"q": self.gated_queries, "k": self.keys, "v": self.values}), **output}
        rank, of_kv = self.latent.query_rank, self.latent.kv_rank
        query = {"linear_q_down_proj": (self.hidden, {"": rank}), "linear_q_up_proj": (rank, {"": self.queries})}
        return {
            **(query if rank else {"linear_q_proj": (self.hidden, {"": self.queries})}),
            "linear_kv_down_proj": (self.hidden, {"": of_kv + self.latent.rotary}),
            "linear_kv_up_proj": (of_kv, {"": self.queries - self.heads * self.latent.rotary + self.values}),
            **output,
        }

    @property
    def attention_matrices(self) -> int:
        """Weights of one layer's attention that are multiplied with."""
        return sum(inputs * sum(parts.values()) for inputs, parts in self.projections.values())

    def mlp_matrices(self, ffn: int, hidden: int | None = None) -> int:
        """Weights of one feed-forward network of inner size `ffn`."""
        return (self.gates + 1) * (hidden or self.hidden) * ffn

    @property
    def expert_matrices(self) -> int:
        """Weights that one token is multiplied with in a layer with experts: router, chosen and shared experts."""
        routed = self.active_experts * self.mlp_matrices(self.expert_ffn, self.expert_hidden)
        latent = 2 * self.hidden * self.expert_hidden if self.expert_hidden != self.hidden else 0
        shared = self.mlp_matrices(self.shared_ffn) + self.shared_gate * self.hidden
        return self.hidden * self.num_experts + routed + latent + shared


def shape_of(provider: Any) -> Shape:
    """Return a provider's shape. Raises UserError for a model of another kind: other formulas apply."""
    try:
        return _shape(provider)
    except AttributeError as error:
        raise UserError(
            f"no formula for the size of a `{type(provider).__name__}`: it has no `{error.name}`",
            hint="only models with the fields of `GPTModelProvider` are counted",
        ) from error


def _shape(provider: Any) -> Shape:
    _check_kinds(provider)
    heads, hidden = provider.num_attention_heads, provider.hidden_size
    if not heads or not hidden:  # a provider of the user's own need not say
        raise UserError(
            f"no formula for the size of a `{type(provider).__name__}`: its `num_attention_heads` is `{heads}`",
            hint="only models with the fields of `GPTModelProvider` are counted",
        )
    ffn, mtp = provider.ffn_hidden_size or 4 * hidden, provider.mtp_num_layers or 0
    experts, latent = provider.num_moe_experts or 0, _latent(provider)
    head = provider.kv_channels or hidden // heads
    return Shape(
        layers=provider.num_layers,
        hidden=hidden,
        heads=heads,
        groups=heads if latent else provider.num_query_groups or heads,
        head=provider.qk_head_dim + latent.rotary if latent else head,
        value=provider.v_head_dim if latent else head,
        latent=latent,
        gated=bool(provider.attention_output_gate),
        normed=(heads + (provider.num_query_groups or heads)) * head if provider.qk_layernorm and not latent else 0,
        ffn=ffn,
        gates=2 if provider.gated_linear_unit else 1,
        biases=provider.add_bias_linear,
        vocab=provider.vocab_size,
        padded_vocab=provider.padded_vocab_size,
        split=layers_of_each(provider) == 2,
        mtp=mtp,
        kinds=_and_more(_kinds(provider), mtp),
        num_experts=experts,
        active_experts=provider.moe_router_topk if experts else 0,
        expert_ffn=(provider.moe_ffn_hidden_size or ffn) if experts else 0,
        expert_hidden=(provider.moe_latent_size if experts else None) or hidden,
        shared_ffn=(provider.moe_shared_expert_intermediate_size or 0) if experts else 0,
        shared_gate=bool(experts and provider.moe_shared_expert_intermediate_size and provider.moe_shared_expert_gate),
    )


def _check_kinds(provider: Any) -> None:
    """Raise UserError for layers of a kind that is not counted."""
    variant, pattern = provider.experimental_attention_variant, provider.hybrid_layer_pattern or ""
    unlike = {
        "experimental_attention_variant": variant not in VARIANTS and variant,
        "heterogeneous_block_specs": getattr(provider, "heterogeneous_block_specs", None),
        "hybrid_layer_pattern": set(pattern) - {MAMBA, ATTENTION, MLP, EXPERTS} and pattern,
    }
    for name, value in unlike.items():
        if value:
            raise UserError(
                f"no formula for the size of a model with `{name}`: `{value}`",
                hint="only models of attention, Mamba-2, gated delta nets, feed-forward layers and experts are counted",
            )


def _kinds(provider: Any) -> tuple[Kind, ...]:
    """Return the kind of each of a provider's layers, without multi-token prediction."""
    windows = _windows(provider)
    if pattern := provider.hybrid_layer_pattern:
        return tuple(_of_symbol(provider, symbol, window) for symbol, window in zip(pattern, windows, strict=True))
    each = zip(windows, delta_nets(provider), indexers(provider), layers_with_experts(provider), strict=True)
    return tuple(
        Kind(net, net is None, None if net else window, indexer, experts, not experts) for window, net, indexer, experts in each
    )


def _of_symbol(provider: Any, symbol: str, window: int | None) -> Kind:
    if symbol == MAMBA:
        return Kind(recurrence=mamba(provider))
    attends = symbol == ATTENTION
    return Kind(attends=attends, window=window if attends else None, experts=symbol == EXPERTS, dense=symbol == MLP)


def _latent(provider: Any) -> Latent | None:
    if not provider.multi_latent_attention:
        return None
    return Latent(provider.q_lora_rank or 0, provider.kv_lora_rank, provider.qk_pos_emb_head_dim)


def _and_more[T](layers: tuple[T, ...], mtp: int) -> tuple[T, ...]:
    """Repeat the last layer for those of multi-token prediction."""
    return layers + layers[-1:] * mtp


def _windows(provider: Any) -> tuple[int | None, ...]:
    """Return the tokens that a token of each layer sees; with sparse attention, the tokens that it chooses."""
    if provider.experimental_attention_variant == SPARSE:
        return (provider.dsa_indexer_topk,) * provider.num_layers
    window, skipped = provider.window_size, provider.window_attn_skip_freq
    in_window = (is_layer_window_attention(window, skipped, layer + 1) for layer in range(provider.num_layers))
    return tuple(window[0] + 1 if windowed else None for windowed in in_window)
