"""What is done to embeddings: positions that begin at another number (OPT), dropout of its own, a LayerNorm after it (Bloom)."""

from __future__ import annotations

from typing import Any

import torch


def position_offset(provider: Any, model: Any) -> None:
    """Add `position_offset` to the positions whose learned embeddings are added to those of tokens."""
    if not provider.position_offset or not model.pre_process:
        return

    def shifted(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "position_ids": kwargs["position_ids"] + provider.position_offset}

    model.embedding.register_forward_pre_hook(shifted, with_kwargs=True)


def embedding_dropout(provider: Any, model: Any) -> None:
    """Drop another share of the embeddings' numbers than of what branches add."""
    if provider.embedding_dropout is not None and model.pre_process:
        model.embedding.embedding_dropout.p = provider.embedding_dropout


def embedding_layernorm(provider: Any, model: Any) -> None:
    """Normalize the embeddings, [sequence, batch, hidden], by `embedding.layernorm`."""
    if not provider.embedding_layernorm or not model.pre_process:
        return
    norm = torch.nn.LayerNorm(provider.hidden_size, eps=provider.layernorm_epsilon, dtype=provider.params_dtype)
    for parameter in norm.parameters():
        # Each rank then has some tokens of the sequence, and megatron-core adds up the ranks' gradients.
        parameter.sequence_parallel = provider.sequence_parallel  # type: ignore[attr-defined]
    model.embedding.layernorm = norm
    model.embedding.register_forward_hook(lambda module, _args, embedded: module.layernorm(embedded))
