"""Norms of query and key after they are turned by the rotary embedding; megatron-core norms them before (Hunyuan)."""

from __future__ import annotations

from typing import Any

from trainer.layers.spec import attention_layers


def late_norms(provider: Any, model: Any) -> None:
    """Move the norms of query and key of each layer to where its core attention begins. Their weights keep their names.

    With a key-value cache megatron-core keeps keys as they were before the rotary embedding, and so before the norm.
    """
    if not provider.qk_layernorm_after_rope:
        return
    for layer in attention_layers(model):
        attention = layer.self_attention
        hook = _Normed(attention.q_layernorm, attention.k_layernorm)
        attention.core_attention.register_forward_pre_hook(hook)
        for norm in (attention.q_layernorm, attention.k_layernorm):
            norm.forward = _unchanged


class _Normed:
    """A hook of a core attention, which gets query and key first."""

    def __init__(self, *norms: Any) -> None:
        self.forwards = [norm.forward for norm in norms]

    def __call__(self, _module: Any, args: Any) -> Any:
        normed = (forward(states) for forward, states in zip(self.forwards, args[:2], strict=True))
        return *normed, *args[2:]


def _unchanged(states: Any) -> Any:
    return states
