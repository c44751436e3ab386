"""Several examples in a row learn what each learns alone."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.chat import packed

TP2 = {"model__tensor_model_parallel_size": 2}
PP2 = {"model__pipeline_model_parallel_size": 2}
PP4 = {"model__pipeline_model_parallel_size": 4}
VPP2 = {**PP2, "model__virtual_pipeline_model_parallel_size": 2}
RECOMPUTE = {
    "model__recompute_granularity": "full",
    "model__recompute_method": "uniform",
    "model__recompute_num_layers": 1,
}
LAYOUTS = {
    "one": (1, {}), "two_rows_at_once": (1, {"train__micro_batch_size": 2}), "recompute": (1, RECOMPUTE), "tp2": (2, TP2),
    "pp2": (2, PP2), "pp4": (4, PP4), "vpp2": (2, VPP2), "dp2": (2, {}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_losses_and_gradients_are_those_of_examples_alone(layout, ranks, model_folder):
    world, changes = LAYOUTS[layout]
    folder = str(model_folder("gqa"))
    alone = ranks.run(packed.train, world, folder, False, changes)
    together = ranks.run(packed.train, world, folder, True, changes)
    for one, other in zip(alone, together, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-5)
        assert other.grad_norms == pytest.approx(one.grad_norms, rel=1e-5)
        assert other.evaluations == [(split, pytest.approx(loss, rel=1e-5)) for split, loss in one.evaluations]
        assert other.gradients.keys() == one.gradients.keys()
        for name, gradient in one.gradients.items():
            torch.testing.assert_close(other.gradients[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())
