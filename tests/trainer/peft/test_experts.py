"""An adapter for each expert, wherever experts lie and however ranks divide them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from formats.errors import UserError
from tests.trainer.peft.runs import Watched

MOE = Path(__file__).parents[3] / "examples" / "moe.py"


def _train(save, start, model, kind, told):
    from trainer import peft, pretrain

    example = runpy.run_path(str(MOE), run_name="moe")
    sys.modules.setdefault("moe", type(sys)("moe"))
    config = example["settings"](save=save, start=start)
    config.train.train_iters = 6 if kind else 1
    config.optimizer.lr = 2e-2
    for name, value in model.items():
        setattr(config.model, name, value)
    if kind:
        config.peft = getattr(peft, kind)(dim=4, alpha=16, **told)
    history = Watched()
    pretrain(config, callbacks=[history] if kind else [])
    return history.losses, history.grad_norms, {name: tuple(one.shape) for name, one in history.weights.items()}


@pytest.fixture(scope="module")
def start(ranks, tmp_path_factory):
    """The same experts for every layout."""
    folder = str(tmp_path_factory.mktemp("moe"))
    ranks.run(_train, 1, folder, None, {}, None, {})
    return folder


@pytest.mark.parametrize(
    ("kind", "told", "alone"), [("LoRA", {}, False), ("DoRA", {"canonical": True}, False), ("LoRA", {}, True)]
)
def test_experts_are_trained_the_same_wherever_they_lie(kind, told, alone, ranks, start):
    """`alone`: only experts are trained."""
    told = told | ({"exclude_modules": ["*.self_attention.*"]} if alone else {})
    ((losses, norms, names),) = ranks.run(_train, 1, None, start, {}, kind, told)
    answers = ranks.run(_train, 2, None, start, {"expert_model_parallel_size": 2}, kind, told)
    for found, found_norms, _ in answers:
        assert found == pytest.approx(losses, abs=1e-4)
        assert found_norms == pytest.approx(norms, rel=1e-3)
    assert set().union(*(found for *_, found in answers)) == set(names)
    for number in range(4):
        assert any(f".local_experts.{number}." in name for name in names)


def test_grouped_experts_are_refused(ranks, start):
    class TEColumnParallelGroupedLinear(torch.nn.Module):
        pass

    from trainer.peft.linear import describe_linear

    grouped = type("TEGroupedLinear", (TEColumnParallelGroupedLinear,), {})()
    with pytest.raises(UserError, match="computes several experts at once") as caught:
        describe_linear(grouped, "decoder.layers.0.mlp.experts.linear_fc1")
    assert "moe_grouped_gemm=false" in caught.value.hint
