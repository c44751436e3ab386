"""On GPUs: a resumed run is the uninterrupted one. Left out by `make test`.

The first test must fail with `MBTRAIN_UNMENDED=1`, which saves as megatron-core 0.19.2 does:

    python -m pytest -m gpu tests/trainer/test_gpu_resume.py
    MBTRAIN_UNMENDED=1 python -m pytest -m gpu tests/trainer/test_gpu_resume.py -k buckets
"""

from __future__ import annotations

import os

import pytest
import torch

from converter import check
from tests import models
from tests.trainer import shifting, witness

pytestmark = pytest.mark.gpu

SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 512,
}  # fmt: skip
GPU = {
    **shifting.WIDE,
    "dist__device": "gpu",
    "dataset__sequence_length": 128,
    "ddp__bucket_size": 500_000,
}
DETERMINISTIC = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama that Transformer Engine's kernels take."""
    return str(models.save(models.build("gqa", **SHAPE), tmp_path_factory.mktemp("gpu") / "model"))


@pytest.mark.parametrize("async_save", [False, True])
def test_several_buckets_with_padding_are_saved_right_on_two_gpus(async_save, ranks, folder, tmp_path):
    """Kernels are not deterministic here: losses are near, and masters are compared with weights."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pairs = shifting.in_two(lambda told: ranks.run(shifting.train, 2, folder, {**GPU, **told}), tmp_path, async_save=async_save)
    for whole, resumed in pairs:
        print(f"uninterrupted {whole.losses[shifting.STOPPED :]}, resumed {resumed.losses}")
    assert check(tmp_path).wrong_masters == []
    for whole, resumed in pairs:
        assert resumed.losses == pytest.approx(whole.losses[shifting.STOPPED :], abs=2e-3)


def _train_deterministic(folder, changes):
    os.environ.update(DETERMINISTIC)
    torch.use_deterministic_algorithms(True)
    return witness.train(folder, changes)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(ranks, folder, tmp_path):
    """On one GPU, with deterministic kernels: losses, gradient norms, weights and the optimizer's state."""

    def train(changes):
        return ranks.run(_train_deterministic, 1, folder, {**GPU, "model__deterministic_mode": True, **changes})

    (pair,) = shifting.in_two(train, tmp_path)
    assert shifting.differences(*pair) == []
