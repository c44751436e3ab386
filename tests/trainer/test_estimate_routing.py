"""How many tokens experts get, in the estimate of memory and in megatron-core."""

from __future__ import annotations

from typing import Any

import pytest

from tests.trainer import observed, small
from tests.trainer.trials import BIAS
from trainer.estimate import routing
from trainer.settings.resolve import resolve

TP2 = {"model.tensor_model_parallel_size": 2}
EP2, ETP1 = {"model.expert_model_parallel_size": 2}, {"model.expert_tensor_parallel_size": 1}
CAPACITY = {"model.moe_expert_capacity_factor": 1.25}
LAYOUTS = {
    "one rank": (1, {}),
    "ep2": (2, EP2),
    "ep2, more experts per token than on a rank": (2, {**EP2, "model.moe_router_topk": 3}),
    "tp2": (2, TP2),
    "etp2": (2, {"model.expert_tensor_parallel_size": 2}),
    "tp2 ep2 etp1": (2, {**TP2, **EP2, **ETP1}),
    "ep2, capacity": (2, {**EP2, **CAPACITY}),
    "ep2, padded to capacity": (2, {**EP2, **CAPACITY, "model.moe_pad_expert_input_to_capacity": True}),
}


class Rows(small.History):
    """Counts the rows that this rank's experts get, where each token chooses the first ones, or those its router chooses."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.first, self.rows = first, 0

    def on_start(self, run: Any) -> None:
        for module in (module for chunk in run.chunks for module in chunk.modules()):
            if self.first and getattr(module, "expert_bias", None) is not None:
                module.expert_bias -= 10.0 * module.expert_bias.new_tensor(range(len(module.expert_bias)))
            for expert in getattr(module, "local_experts", ()):
                expert.register_forward_pre_hook(self._count)

    def _count(self, _expert: Any, inputs: tuple[Any, ...]) -> None:
        self.rows += len(inputs[0])


def rows(changes: dict[str, Any], first: bool) -> int:
    """Run one step on this rank, of one microbatch of 16 tokens in two layers."""
    from trainer.loop import pretrain

    seen = Rows(first=first)
    pretrain(observed.settings(**changes), callbacks=[seen])
    return seen.rows


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_gets_as_many_tokens_as_the_estimate_says(name, ranks):
    world, layout = LAYOUTS[name]
    copies = world // layout.get("model.tensor_model_parallel_size", 1)
    changes = {**BIAS, **layout, "train.train_iters": 1, "train.global_batch_size": copies}
    model = resolve(observed.settings(**changes), world_size=world, device="cpu").config.model
    tokens = 16 * 2
    assert max(ranks.run(rows, world, changes, True)) == routing.most_pairs(model) * tokens
    if "capacity" not in name:
        assert sum(ranks.run(rows, world, changes, False)) == routing.even_pairs(model) * tokens * world


def test_forced_balance_leaves_nothing_uneven():
    forced = observed.settings(**{**BIAS, **EP2, "model.moe_router_force_load_balancing": True}).model
    assert routing.most_pairs(forced) == routing.even_pairs(forced)
