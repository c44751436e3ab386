"""Tokens of experts that are not sorted a second time.

A dispatcher of megatron-core groups a rank's tokens by expert, exchanges them among ranks, and sorts what came from each rank by
expert again. On a single rank they are sorted already: the second sort moves every token to where it is, twice forward and twice
backward.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


def sorted_once(provider: Any, model: Any) -> None:
    """Leave the second sort out where no ranks exchange tokens: dispatchers do for a rank that has one expert."""
    if not provider.num_moe_experts or provider.moe_pad_expert_input_to_capacity:
        return
    for module in model.modules():
        dispatcher = getattr(module, "token_dispatcher", None)
        if type(dispatcher) is MoEAlltoAllTokenDispatcher and dispatcher.ep_size == dispatcher.tp_size == 1:
            dispatcher.num_local_experts = 1
