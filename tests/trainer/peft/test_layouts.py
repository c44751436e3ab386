"""What is trained is the same however ranks divide the model: gradients of each adapter, their norm, and what is frozen."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.peft.runs import FULL, LAYOUTS, ONE_STEP, run, whole

WAYS = {
    "lora": ("LoRA", {}),
    "canonical": ("LoRA", {"canonical": True}),
    "dora": ("DoRA", {}),
    "canonical_dora": ("DoRA", {"canonical": True}),
}
STEPS = {"train__train_iters": 6, "scheduler__lr_decay_iters": 20}
UNCLIPPED = {"optimizer__clip_grad": 1e9}
ONE_LAYER = {"target_modules": ["*.layers.3.*.linear_qkv", "*.layers.3.*.linear_fc2"]}


@pytest.fixture(scope="module")
def begin(ranks, model_folder):
    """Random tensors for every adapter, B too."""
    known = {}

    def make(way):
        if way not in known:
            kind, settings = WAYS[way]
            (result,) = ranks.run(run, 1, str(model_folder("gqa")), ONE_STEP, kind, settings)
            made = torch.Generator().manual_seed(5)
            known[way] = {
                name: weight if "magnitude" in name else torch.randn(weight.shape, generator=made) * 0.05
                for name, weight in result["weights"].items()
            }
        return known[way]

    return make


@pytest.mark.parametrize("way", WAYS)
def test_each_gradient_at_tp2_is_that_of_one_rank(way, ranks, model_folder, begin):
    kind, settings = WAYS[way]
    folder, changes = str(model_folder("gqa")), ONE_STEP | UNCLIPPED
    (alone,) = ranks.run(run, 1, folder, changes, kind, settings, begin(way))
    spread = ranks.run(run, 2, folder, changes | LAYOUTS["tp2"][1], kind, settings, begin(way))
    assert alone["seen"].keys() == begin(way).keys() == spread[0]["seen"].keys()
    for name, (gradient, *_) in alone["seen"].items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(whole([rank["seen"][name] for rank in spread]), gradient, rtol=1e-4, atol=1e-6)
    assert spread[0]["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-5)


@pytest.mark.parametrize("way", ["lora", "dora"])
def test_recomputed_activations_train_the_same(way, ranks, model_folder):
    """The embedding is frozen, and megatron-core's recomputation asks whether its input needs gradients."""
    kind, settings = WAYS[way]
    folder = str(model_folder("gqa"))
    (plain,) = ranks.run(run, 1, folder, STEPS, kind, settings)
    for changes in (FULL, {"model__recompute_granularity": "selective"}):
        (recomputed,) = ranks.run(run, 1, folder, STEPS | changes, kind, settings)
        assert (recomputed["losses"], recomputed["grad_norms"]) == (plain["losses"], plain["grad_norms"])


@pytest.mark.parametrize(
    "changes",
    [{}, {"ddp__use_distributed_optimizer": True}, {"mixed_precision": "bf16_mixed"}, FULL],
    ids=["fp32", "distributed", "bf16", "recomputed"],
)
@pytest.mark.parametrize("layer", [0, 3])
def test_a_pipeline_stage_may_train_nothing(changes, layer, ranks, model_folder):
    folder, settings = str(model_folder("tied")), {"target_modules": [f"*.layers.{layer}.*.linear_qkv"]}
    (alone,) = ranks.run(run, 1, folder, STEPS | changes, "LoRA", settings)
    stages = ranks.run(run, 2, folder, STEPS | changes | LAYOUTS["pp2"][1], "LoRA", settings)
    assert [len(stage["weights"]) for stage in stages] == ([2, 0] if layer == 0 else [0, 2])
    for stage in stages:
        assert stage["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert stage["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-3)


def test_a_virtual_pipeline_trains_the_same(ranks, model_folder):
    folder = str(model_folder("gqa"))
    (alone,) = ranks.run(run, 1, folder, STEPS, "LoRA", ONE_LAYER)
    virtual = LAYOUTS["pp2"][1] | {"model__virtual_pipeline_model_parallel_size": 2}
    for stage in ranks.run(run, 2, folder, STEPS | virtual, "LoRA", ONE_LAYER):
        assert stage["losses"] == pytest.approx(alone["losses"], abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"mixed_precision": "bf16_mixed"}], ids=["fp32", "bf16"])
def test_frozen_parameters_have_no_state(changes, ranks, model_folder):
    (result,) = ranks.run(run, 1, str(model_folder("gqa")), STEPS | changes, "LoRA", {})
    assert result["held"] == len(result["weights"]) == 4 * 4 * 2  # layers, linear layers, A and B


OVERLAPPED = {"ddp__use_distributed_optimizer": True, "ddp__overlap_grad_reduce": True, "ddp__overlap_param_gather": True}


@pytest.mark.parametrize("way", ["dora", "canonical_dora"])
def test_data_parallel_ranks_train_as_one(way, ranks, model_folder):
    """Also where a parameter is gathered behind the scenes until the module that holds it is called."""
    folder, (kind, settings) = str(model_folder("gqa")), WAYS[way]
    (alone,) = ranks.run(run, 1, folder, STEPS, kind, settings)
    for changes in ({}, {"ddp__use_distributed_optimizer": True}, OVERLAPPED):
        for rank in ranks.run(run, 2, folder, STEPS | changes, kind, settings):
            assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-4)
            assert rank["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-4)
