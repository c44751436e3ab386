"""Queries, keys and values clamped to a range, after their norms and before the rotary embedding. DBRX, OLMo 1, OLMoE, MPT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.layers.spec import transformer_layers


def clipped(provider: Any, model: Any) -> None:
    """Clamp queries, keys and values of each layer to -`provider.clip_qkv` … `provider.clip_qkv`, if it is set."""
    if provider.clip_qkv is None:
        return
    for layer in transformer_layers(model):
        attention = layer.self_attention
        if hasattr(attention, "get_query_key_value_tensors"):  # which a HybridModel's feed-forward layers have not
            attention.get_query_key_value_tensors = _Clipped(attention.get_query_key_value_tensors, provider.clip_qkv)


class _Clipped:
    """A function that projects to queries, keys and values, adapters included, and returns them clamped."""

    def __init__(self, project: Callable[..., Any], limit: float) -> None:
        self.project, self.limit = project, limit

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        query, key, value, *gate = self.project(*args, **kwargs)
        return *(states.clamp(-self.limit, self.limit) for states in (query, key, value)), *gate
