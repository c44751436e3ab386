"""Numbers of tokens per expert that stay on the GPU.

megatron-core copies them to the CPU in each layer, and waits for the copy: Transformer Engine starts one product for each expert.
torch computes the products of all in one kernel, which reads the numbers where they are; a CUDA graph needs that.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from trainer.config import captures_steps


class TokenCounts:
    """The tokens of each expert, int64 `[experts]`, in the place of a list."""

    def __init__(self, counts: torch.Tensor) -> None:
        self._counts = counts

    def tolist(self) -> TokenCounts:
        """Return itself: megatron-core's layer of experts asks for a list, and hands it to the layers in it."""
        return self

    @cached_property
    def ends(self) -> torch.Tensor:
        """Return where the tokens of each expert end, int32 `[experts]`."""
        return self._counts.cumsum(0, dtype=torch.int32)


def counted_on_device(provider: Any, model: Any) -> None:
    """Leave the numbers on the GPU where a step is captured."""
    if not provider.num_moe_experts or not captures_steps(provider):
        return
    for module in model.modules():
        dispatcher = getattr(module, "token_dispatcher", None)
        if isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
            dispatcher._maybe_dtoh_and_synchronize = _without_copy


def _without_copy(_point: str, counts: Any = None) -> Any:
    """Return the numbers of tokens in the place of a copy on the CPU."""
    return TokenCounts(counts) if isinstance(counts, torch.Tensor) else counts
