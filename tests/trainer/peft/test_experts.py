"""An adapter for each expert, wherever experts lie and however ranks divide them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from formats.errors import UserError
from tests.trainer.peft.runs import Watched
from tests.trainer.trials import SHARED

MOE = Path(__file__).parents[3] / "examples" / "moe.py"


EXPERT_TENSORS = {
    False: {"linear_fc1.adapter.linear_in.weight": (4, 4, 64), "linear_fc1.adapter.linear_out.weight": (4, 128, 4)},
    True: {
        "linear_fc1.adapter.adapter_up.linear_in.weight": (4, 4, 64),
        "linear_fc1.adapter.adapter_up.linear_out.weight": (4, 64, 4),
    },
}
"""Tensors of the example's 4 experts by `canonical`."""


def train(start, model, kind, settings, run=None):
    """Train the example; `run`: where to `save` or `load`, after how many steps to `stop`, and whether experts are `grouped`."""
    from tests.trainer.peft import grouped_layers
    from trainer import peft, pretrain

    run = run or {}
    example = runpy.run_path(str(MOE), run_name="moe")
    sys.modules.setdefault("moe", type(sys)("moe"))
    config = example["settings"](save=run.get("save"), start=start)
    config.train.train_iters = 6 if kind else 1
    config.train.exit_interval = run.get("stop")
    config.checkpoint.load = run.get("load")
    config.optimizer.lr = 2e-2
    for name, value in model.items():
        setattr(config.model, name, value)
    if run.get("grouped"):
        grouped_layers.use()
    if kind:
        config.peft = getattr(peft, kind)(dim=4, alpha=16, **settings)
    history = Watched()
    pretrain(config, callbacks=[history] if kind else [])
    return history.losses, history.grad_norms, {name: tuple(weight.shape) for name, weight in history.weights.items()}


CASES = [
    ("LoRA", {}, False, {}),
    ("DoRA", {"canonical": True}, False, {}),
    ("LoRA", {}, True, {}),
    ("LoRA", {}, True, {"grouped": True}),
]


@pytest.mark.parametrize("case", CASES)
def test_experts_are_trained_the_same_wherever_they_lie(case, ranks, start):
    """`alone`: only experts are trained."""
    kind, settings, alone, run = case
    settings = settings | ({"exclude_modules": ["*.self_attention.*"]} if alone else {})
    ((losses, norms, names),) = ranks.run(train, 1, start, {}, kind, settings, run)
    answers = ranks.run(train, 2, start, {"expert_model_parallel_size": 2}, kind, settings, run)
    for rank_losses, rank_norms, _ in answers:
        assert rank_losses == pytest.approx(losses, abs=1e-4)
        assert rank_norms == pytest.approx(norms, rel=1e-3)
    assert set().union(*(trained for *_, trained in answers)) == set(names)
    for number in () if run else range(4):
        assert any(f".local_experts.{number}." in name for name in names)


def of_shared_experts(changes):
    """Train an adapter on shared experts; losses, or the error."""
    from tests.trainer import observed
    from trainer import peft, pretrain

    config, history = observed.settings(**{**SHARED, "checkpoint.random_weights": True, **changes}), Watched()
    config.peft = peft.LoRA(dim=4, target_modules=["*.shared_experts.*"])
    try:
        pretrain(config, callbacks=[history])
    except UserError as error:
        return str(error)
    return history.losses


def test_shared_experts_whose_tokens_are_exchanged_outside_them_get_no_adapter(ranks):
    beside, two = {"model.moe_shared_expert_overlap": True}, {"model.tensor_model_parallel_size": 2}
    ((apart,), (together,)) = (ranks.run(of_shared_experts, 1, changes) for changes in ({}, beside))
    assert together == pytest.approx(apart, abs=1e-6)
    assert ranks.run(of_shared_experts, 2, two)[0] == pytest.approx(apart, abs=1e-5)
    refused = ranks.run(of_shared_experts, 2, {**two, **beside})
    assert refused[0] == refused[1]
    assert "shared_experts.linear_fc1`: with `model.moe_shared_expert_overlap` and" in refused[0]
    assert "hint: set `model.moe_shared_expert_overlap=false`, or `peft.exclude_modules=['*.shared_experts.*']`" in refused[0]
