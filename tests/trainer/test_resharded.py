"""A run goes on from `mbconvert reshard` of its checkpoint as from the checkpoint itself."""

from __future__ import annotations

import pytest

from converter import inspect, reshard
from tests.converter.family_suite import save_small
from tests.trainer import witness

STEPS, STOPPED = 8, 3
PLAN = {"train__train_iters": STEPS, "validation__eval_iters": 0, "logger__log_interval": 2}
DISTRIBUTED = {"ddp__use_distributed_optimizer": True, "mixed_precision": "bf16_mixed"}
DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
TP2, PP2 = {"model__tensor_model_parallel_size": 2}, {"model__pipeline_model_parallel_size": 2}


@pytest.fixture
def run(ranks, model_folder):
    """Train on the ranks of a layout, from what is at `load`, and save at `save`."""

    def train(world, changes, *, load, save, variant="gqa"):
        checkpoints = {"checkpoint__load": str(load), "checkpoint__save": str(save)}
        return ranks.run(witness.train, world, str(model_folder(variant)), {**PLAN, **changes, **checkpoints})

    return train


def same(expected, resumed):
    for reference, actual in zip(expected, resumed, strict=True):
        assert (actual.losses, actual.grad_norms, actual.rates) == (reference.losses, reference.grad_norms, reference.rates)
        assert witness.differences(reference.left, actual.left) == []


def stopped(run, world, changes, folder):
    run(world, {**changes, "train__exit_interval": STOPPED}, load=folder, save=folder)
    return folder


def test_at_the_same_layout_the_run_is_the_uninterrupted_one_bit_for_bit(run, tmp_path):
    changes = {**DISTRIBUTED, **DROPOUT, **TP2}
    whole = run(2, changes, load=tmp_path / "whole", save=tmp_path / "whole")
    reshard(stopped(run, 2, changes, tmp_path / "parts"), tmp_path / "made", tp=2, verify=True)
    for expected, actual in zip(whole, run(2, changes, load=tmp_path / "made", save=tmp_path / "on"), strict=True):
        assert (actual.losses, actual.grad_norms) == (expected.losses[STOPPED:], expected.grad_norms[STOPPED:])
        assert witness.differences(expected.left, actual.left) == []


LAYOUTS = {
    "tp1 to tp2": ({}, TP2, {"tp": 2}),
    "tp2 to pp2": (TP2, PP2, {"pp": 2}),
    "pp2 to hybrid": (PP2, {**PP2, "model__layout": "hybrid"}, {"pp": 2, "layout": "hybrid"}),
}


@pytest.mark.parametrize("pair", LAYOUTS)
def test_at_another_layout_it_goes_on_as_from_the_checkpoint_itself(pair, run, tmp_path):
    before, after, sizes = LAYOUTS[pair]
    saved = stopped(run, 2, {**DISTRIBUTED, **before}, tmp_path / "saved")
    expected = run(2, {**DISTRIBUTED, **after}, load=saved, save=tmp_path / "expected")
    reshard(saved, tmp_path / "made", verify=True, **sizes)
    assert inspect(tmp_path / "made").optimizer_state
    same(expected, run(2, {**DISTRIBUTED, **after}, load=tmp_path / "made", save=tmp_path / "on"))


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_experts_go_on_at_another_expert_parallelism(ranks, tmp_path, before, after):
    model = str(save_small("mixtral", tmp_path / "model"))
    saving, resuming = ({"model__expert_model_parallel_size": size} for size in (before, after))

    def train(changes, load, save):
        checkpoints = {"checkpoint__load": str(load), "checkpoint__save": str(save)}
        return ranks.run(witness.train, 2, model, {**PLAN, **DISTRIBUTED, **changes, **checkpoints})

    train({**saving, "train__exit_interval": STOPPED}, tmp_path / "saved", tmp_path / "saved")
    expected = train(resuming, tmp_path / "saved", tmp_path / "expected")
    reshard(tmp_path / "saved", tmp_path / "made", ep=after, verify=True)
    same(expected, train(resuming, tmp_path / "made", tmp_path / "on"))
