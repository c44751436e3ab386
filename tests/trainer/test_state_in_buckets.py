"""Optimizer state that a run saved `dp_reshardable` is read as what the same run saved `fully_reshardable`.

Data-parallel ranks share the writing, so the index has the keys in another order than the model registers its parameters.
"""

from __future__ import annotations

import pytest

from formats.detect import open_megatron
from formats.folder import LocalFolder
from formats.optimizer.open import open_optimizer
from tests import models
from tests.formats.test_optimizer import values
from tests.trainer import small

TP2, PP2 = {"model__tensor_model_parallel_size": 2}, {"model__pipeline_model_parallel_size": 2}
EP2, ETP1 = {"model__expert_model_parallel_size": 2}, {"model__expert_tensor_parallel_size": 1}
SHORT = {
    "mixed_precision": "bf16_mixed", "train__train_iters": 2, "train__micro_batch_size": 1, "scheduler__lr_warmup_iters": 1,
    "ddp__use_distributed_optimizer": True,
}  # fmt: skip
BUCKETS = {"ddp__bucket_size": 10_000, "comm_overlap__overlap_grad_reduce": True}
LAYOUT = "model__pipeline_model_parallel_layout"
VPP2 = {"model__virtual_pipeline_model_parallel_size": 2}
FAST = {
    "tp2 dp2, frozen biases": ("attention_bias", 4, TP2),
    "tied pp2 dp2": ("tied", 4, PP2),
    "ep2 pp2": ("mixtral", 4, {**PP2, **EP2}),
}
SLOW = {
    "dp3 in buckets": ("gqa", 3, {**BUCKETS, "train__global_batch_size": 3}),
    "pp2 vpp2": ("gqa", 2, {**PP2, **VPP2}),
    "uneven": ("gqa", 2, {**PP2, "model__num_layers_in_first_pipeline_stage": 1}),
    "embedding alone": ("tied", 2, {**PP2, LAYOUT: "E|ttttL"}),
    "experts with all else": ("mixtral", 2, {}),
    "ep2 dp2": ("mixtral", 4, EP2),
    "tp2 ep2 etp1": ("qwen3_moe", 2, {**TP2, **EP2, **ETP1}),
    "etp2": ("mixtral", 2, {"model__expert_tensor_parallel_size": 2}),
    "latent attention, prediction layers, pp2": ("deepseek_v3", 2, PP2),
}
CASES = {**FAST, **SLOW}


@pytest.mark.parametrize("case", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_both_ways_of_storing_it_hold_the_same(ranks, model_folder, family_folder, tmp_path, case):
    model, world, changes = CASES[case]
    folder = model_folder(model) if model in models.VARIANTS else family_folder(model)
    for kind in ("fully_reshardable", "dp_reshardable"):
        saved = {"checkpoint__save": str(tmp_path / kind), "checkpoint__optim_sharding": kind}
        ranks.run(small.train, world, str(folder), {**SHORT, **changes, **saved})
    readers = [open_megatron(LocalFolder(tmp_path / kind)) for kind in ("dp_reshardable", "fully_reshardable")]
    optimizers = [open_optimizer(reader) for reader in readers]
    assert [optimizer.kind for optimizer in optimizers] == ["dp_reshardable", "fully_reshardable"]
    assert values(optimizers[0]) == values(optimizers[1])
    for reader in readers:
        reader.close()
