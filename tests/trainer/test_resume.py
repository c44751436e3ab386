"""A run that stopped and went on is the run that never stopped."""

from __future__ import annotations

import pytest

from formats.errors import UserError
from tests.trainer import small, witness

STEPS, STOPPED = 8, 3

TP2 = {"model__tensor_model_parallel_size": 2}
PP2 = {"model__pipeline_model_parallel_size": 2}
DISTRIBUTED = {"ddp__use_distributed_optimizer": True}
LAYOUTS = {"tp1": (1, {}), "tp2": (2, TP2), "pp2": (2, PP2), "dp2_distributed": (2, DISTRIBUTED)}
DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
PLAN = {
    "train__train_iters": STEPS,
    "validation__eval_iters": 1,
    "validation__eval_interval": 2,
    "logger__log_interval": 2,  # the stop is in the middle of an interval
}


@pytest.fixture
def run(ranks, model_folder):
    """Train, with `PLAN` and these changes, on the ranks of a layout."""

    def train(world, changes, variant="gqa"):
        return ranks.run(witness.train, world, str(model_folder(variant)), {**PLAN, **changes})

    return train


def _in_two(run, world, changes, folder, **second):
    """Stop after three steps, then go on; what the second part saw."""
    there = {**changes, "checkpoint__save": str(folder), "checkpoint__load": str(folder)}
    run(world, {**there, "train__exit_interval": STOPPED})
    return run(second.pop("world", world), {**there, **second})


def _same(whole, resumed, at=STOPPED):
    for one, other in zip(whole, resumed, strict=True):
        assert other.losses == one.losses[at:]
        assert other.grad_norms == one.grad_norms[at:]
        assert other.rates == one.rates[at:]
        assert other.evaluations == one.evaluations[-len(other.evaluations) :]
        assert witness.differences(one.left, other.left) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(layout, run, tmp_path):
    world, changes = LAYOUTS[layout]
    changes = {**changes, **DROPOUT}
    whole = run(world, {**changes, "checkpoint__save": str(tmp_path / "whole")})
    resumed = _in_two(run, world, changes, tmp_path / "parts", **{"checkpoint__async_save": layout == "pp2"})
    _same(whole, resumed)
    assert witness.metrics(tmp_path / "parts") == witness.metrics(tmp_path / "whole")
