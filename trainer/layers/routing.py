"""Routers that choose and weigh experts as megatron-core's cannot: `moe_router_scoring`.

Each is megatron-core's router with another function that chooses experts, set where megatron-core sets the one that records and
replays choices. Losses, capacity and the balancing of the bias stay megatron-core's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from formats.errors import UserError
from trainer.layers.spec import mlp_parts

Choice = tuple[torch.Tensor, torch.Tensor]
"""The weights and the numbers of the experts of each token, [tokens, experts per token] each."""


def own_scoring(provider: Any, layer: Any) -> None:
    """Give a layer with experts the router that `provider.moe_router_scoring` names."""
    scoring = provider.moe_router_scoring
    if scoring is None or not hasattr(mlp_parts(layer), "router"):
        return
    _check(provider, scoring)
    mlp_parts(layer).router = ROUTERS[scoring]


def _check(provider: Any, scoring: str) -> None:
    """Raise UserError for a router that does not exist, or cannot do what other fields say."""
    if scoring not in ROUTERS:
        supported = ", ".join(f"`{router}`" for router in ROUTERS)
        raise UserError(f"`model.moe_router_scoring` is `{scoring}`", hint=f"set it to one of {supported}")
    if scoring == _BIASED and not provider.moe_router_enable_expert_bias:
        switch = "model.moe_router_enable_expert_bias"
        raise UserError(f"`model.moe_router_scoring` is `{scoring}`, and `{switch}` is `False`", hint=f"set `{switch}=true`")
    for name in ("moe_router_fusion", "moe_enable_routing_replay", "moe_router_group_topk"):
        if getattr(provider, name):
            raise UserError(f"`model.{name}` cannot be used with `model.moe_router_scoring` `{scoring}`", hint=f"unset `{name}`")


class _Chooser:
    """Chooses the experts for a router, instead of megatron-core's `RouterReplay`."""

    layer_number: int | None = None

    def __init__(self, choose: Callable[[torch.Tensor, int], Choice]) -> None:
        self._choose = choose

    def get_replay_topk(self, scores: torch.Tensor, topk: int, *_: Any) -> Choice:
        """Return the choice by softmax scores, [tokens, experts]."""
        return self._choose(scores, topk)


class SoftmaxWithBias(TopKRouter):
    """Choose the experts of the largest softmax + `expert_bias`, and weigh them by their softmax, made to sum to 1 (ERNIE 4.5).

    megatron-core knows a bias with sigmoid scores alone: the configuration says `sigmoid`, and the router computes a softmax.
    """

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.score_function = "softmax"
        self.router_replay = _Chooser(self._choose)  # type: ignore[assignment]

    def _choose(self, scores: torch.Tensor, topk: int) -> Choice:
        chosen = torch.topk(scores + self.expert_bias, topk, dim=-1).indices
        weights = scores.gather(1, chosen)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-12), chosen


class SparseMixer(TopKRouter):
    """Choose two experts, one after the other, each weighed by a softmax over the experts near the best one (Phi-3.5 MoE).

    In training an expert is drawn by its weight. Source: https://arxiv.org/abs/2409.12136, section 2.
    """

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        if self.topk != 2:
            raise UserError(f"`model.moe_router_topk` is `{self.topk}`; SparseMixer chooses two experts", hint="set it to 2")
        self.router_replay = _Chooser(self._choose)  # type: ignore[assignment]
        self._logits: torch.Tensor | None = None

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits [tokens, experts] with that loss attached, and keep them for the choice."""
        self._logits = super().apply_z_loss(logits, padding_mask=padding_mask)
        return self._logits

    def _choose(self, _scores: torch.Tensor, _topk: int) -> Choice:
        logits, self._logits = self._logits, None
        assert logits is not None
        return sparse_mixer(logits, self.config.moe_router_sparsemixer_jitter, training=self.training)


def sparse_mixer(logits: torch.Tensor, jitter: float, *, training: bool) -> Choice:
    """Return the two experts of each token and their weights, by logits [tokens, experts].

    An expert is near the best one if its logit is less than 2 · `jitter` below that, relative to the larger of the best logit and
    its own magnitude.
    """
    first = _mix(logits, logits, jitter, training=training)
    remaining = logits.scatter(-1, first[1], -torch.inf)
    second = _mix(logits, remaining, jitter, training=training)
    weights, chosen = (torch.cat(both, -1) for both in zip(first, second, strict=True))
    return weights, chosen


def _mix(logits: torch.Tensor, remaining: torch.Tensor, jitter: float, *, training: bool) -> Choice:
    """Return one expert of each token, [tokens, 1], among those whose `remaining` logit is finite, and its weight."""
    with torch.no_grad():
        best, chosen = remaining.max(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * jitter
    near = remaining.masked_fill(far, -torch.inf)
    if not training:
        return torch.softmax(near, -1).gather(-1, chosen), chosen
    with torch.no_grad():
        gates = torch.softmax(near, -1)
        drawn = (near - torch.empty_like(near).exponential_().log()).argmax(-1, keepdim=True)
        counts_in_full = (drawn == gates.argmax(-1, keepdim=True)) | (torch.rand_like(best) > _MIDPOINT)
        factor = torch.add(0.3333, counts_in_full, alpha=0.6667).type_as(
            gates
        )  # the rounded numbers that the model was trained with
    return _Weight.apply(logits, gates, drawn, factor), drawn


_MIDPOINT = 0.75
"""The share of drawn experts, other than the best, whose output counts a third: Heun's method of the third order."""


class _Weight(torch.autograd.Function):
    """The weight of a drawn expert, times a factor that has no gradient; the gradient is that of the expert's softmax."""

    @staticmethod
    def forward(ctx: Any, _logits: torch.Tensor, gates: torch.Tensor, drawn: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        weight = gates.gather(-1, drawn)
        ctx.save_for_backward(gates, drawn, weight)
        return weight * factor

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gates, drawn, weight = ctx.saved_tensors
        gradient = gradients[0] * weight
        return (-gates * gradient).scatter_add(-1, drawn, gradient), None, None, None


_BIASED = "softmax_with_bias"
ROUTERS: dict[str, type[TopKRouter]] = {_BIASED: SoftmaxWithBias, "sparsemixer": SparseMixer}
"""The values of `moe_router_scoring`."""
