"""On GPUs: optimizer state in several buckets is saved right. Left out by `make test`.

The test must fail with `MBTRAIN_UNMENDED=1`, which saves as megatron-core 0.19.2 does:

    python -m pytest -m gpu tests/trainer/test_gpu_shifting.py
    MBTRAIN_UNMENDED=1 python -m pytest -m gpu tests/trainer/test_gpu_shifting.py
"""

from __future__ import annotations

import pytest
import torch

from converter import check
from tests import models
from tests.trainer import shifting

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama that Transformer Engine's kernels take."""
    return str(models.save(models.build("gqa", **SHAPE), tmp_path_factory.mktemp("gpu") / "model"))


@pytest.mark.parametrize("async_save", [False, True])
def test_several_buckets_with_padding_are_saved_right_on_two_gpus(async_save, ranks, folder, tmp_path):
    """Kernels are not deterministic here: losses are near, and masters are compared with weights."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pairs = shifting.in_two(
        lambda changes: ranks.run(shifting.train, 2, folder, {**GPU, **changes}), tmp_path, async_save=async_save
    )
    for whole, resumed in pairs:
        print(f"uninterrupted {whole.losses[shifting.STOPPED :]}, resumed {resumed.losses}")
    assert check(tmp_path).wrong_masters == []
    for whole, resumed in pairs:
        assert resumed.losses == pytest.approx(whole.losses[shifting.STOPPED :], abs=2e-3)
