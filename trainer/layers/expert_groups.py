"""Groups of experts rated by another number of their best experts than megatron-core takes: `topk / group_topk`.

DeepSeek-V2 rates a group by its best expert, DeepSeek-V3 by the sum of its two best. megatron-core's router asks an object,
`router_replay`, to choose experts in its place: here one that masks the groups that are not chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trainer.layers.spec import transformer_layers

Choice = tuple[torch.Tensor, torch.Tensor]


def expert_groups(provider: Any, model: Any) -> None:
    """Have the routers of this chunk rate groups by `provider.moe_router_group_score` experts, where that is set."""
    if provider.moe_router_group_score is None:
        return
    for layer in transformer_layers(model):
        if router := getattr(layer.mlp, "router", None):
            router.router_replay = BestGroups(provider.moe_router_group_score)


class BestGroups:
    """A choice of experts in the groups whose `best` best experts have the largest sum of scores."""

    def __init__(self, best: int) -> None:
        self.best = best
        self.layer_number: int | None = None  # which megatron-core sets

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int, group_topk: int, choose: Callable[..., Choice]
    ) -> Choice:
        """Return the scores of the chosen experts and their numbers, both [tokens, topk], of all scores [tokens, experts]."""
        grouped = scores.view(len(scores), num_groups, -1)
        ratings = grouped.topk(self.best, dim=-1).values.sum(dim=-1)
        chosen = ratings.topk(group_topk, dim=-1, sorted=False).indices
        left_out = torch.ones_like(ratings, dtype=torch.bool).scatter(1, chosen, value=False)
        return choose(grouped.masked_fill(left_out[..., None], float("-inf")).view_as(scores), topk)
