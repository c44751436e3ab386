"""On GPUs: with deterministic kernels a run that stopped and went on is the run that never stopped, bit for bit.

Without them it need not be: Transformer Engine's attention adds gradients in an order that varies, cuBLAS may with several
workspaces, and NCCL may choose another algorithm. Left out by `make test`.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests import models
from tests.trainer import witness
from tests.trainer.test_gpu import SHAPE

pytestmark = pytest.mark.gpu

STEPS, STOPPED = 8, 3
COMMON = {
    "dist__device": "gpu",
    "dataset__sequence_length": 128,
    "train__train_iters": STEPS,
    "model__hidden_dropout": 0.1,
    "model__attention_dropout": 0.1,
    "model__cross_entropy_loss_fusion": False,
}
CASES = {
    "fp32": (1, {}),
    "bf16": (1, {"mixed_precision": "bf16_mixed"}),
    "fp16": (1, {"mixed_precision": "fp16_mixed", "optimizer__initial_loss_scale": 2.0**8}),  # a scale that skips no step
    "bf16, distributed optimizer": (2, {"mixed_precision": "bf16_mixed", "ddp__use_distributed_optimizer": True}),
    "FP8, delayed scaling": (1, {"mixed_precision": "bf16_with_fp8_delayed_scaling_mixed"}),
    "FP8, current scaling": (1, {"mixed_precision": "bf16_with_fp8_current_scaling_mixed"}),
    "bf16, TP2": (2, {"mixed_precision": "bf16_mixed", "model__tensor_model_parallel_size": 2}),
}


def _deterministic(folder, changes):
    """A run under the settings that megatron-core's own trainer asks of a deterministic one."""
    from megatron.training import determinism

    determinism.apply_determinism_env(os.environ)
    torch.use_deterministic_algorithms(True)
    return witness.train(folder, changes)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_with_deterministic_kernels(case, ranks, tmp_path):
    world, changes = CASES[case]
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    folder = str(models.save(models.build("gqa", **SHAPE), tmp_path / "model"))
    settings = {**COMMON, **changes}
    checkpoint = {"checkpoint__save": str(tmp_path / "run"), "checkpoint__load": str(tmp_path / "run")}
    # It saves too: after the last step, ranks gather the weights that they divide only where something asks for them.
    whole = ranks.run(_deterministic, world, folder, {**settings, "checkpoint__save": str(tmp_path / "whole")})
    ranks.run(_deterministic, world, folder, {**settings, **checkpoint, "train__exit_interval": STOPPED})
    for uninterrupted, resumed in zip(whole, ranks.run(_deterministic, world, folder, {**settings, **checkpoint}), strict=True):
        assert resumed.losses == uninterrupted.losses[STOPPED:]
        assert witness.differences(uninterrupted.left, resumed.left) == []
