"""On GPUs with Transformer Engine: checkpoints in the layout `hybrid` are loaded strictly, with transformers' logits; Mamba
layers are trained, with Mamba's kernels if they are installed. Left out by `make test`; `-s` prints the figures."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from converter import hf_to_mcore
from tests import models
from tests.converter.family_suite import small_model
from tests.trainer import small, test_parity
from tests.trainer.test_family_training import END, FEW, SHORT
from tests.trainer.test_gpu_families import by_transformers, logits_of_each

pytestmark = pytest.mark.gpu

FAMILIES = ["llama", "qwen3", "qwen3_moe", "mixtral"]


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_of_hybrids_are_those_of_transformers(tp, ranks, tmp_path):
    if torch.cuda.device_count() < tp:
        pytest.skip("needs two GPUs")
    for name in FAMILIES:
        small_model(name).save_pretrained(tmp_path / name / "hf")
        for precision, dtype in (("fp32", "fp32"), ("bf16_mixed", "keep")):
            hf_to_mcore(tmp_path / name / "hf", tmp_path / name / f"megatron_{precision}", tp=2, dtype=dtype, layout="hybrid")
    settings = {"layout": "hybrid", **({"tensor_model_parallel_size": tp} if tp > 1 else {})}
    results = ranks.run(logits_of_each, tp, str(tmp_path), FAMILIES, settings)[0]
    for (name, precision), logits in results.items():
        assert isinstance(logits, torch.Tensor), logits
        exact = by_transformers(tmp_path / name / "hf", "float32")
        error = (logits[..., : exact.shape[-1]] - exact).abs()
        if precision == "fp32":
            assert error.max() < 1e-3 * exact.abs().max(), name
        else:  # a token near the border between two experts may go to another one: medians leave those out
            theirs = (by_transformers(tmp_path / name / "hf", "bfloat16") - exact).abs()
            assert error.median() <= theirs.median() * 1.25, name


@pytest.mark.parametrize("name", ["mamba2", "nemotron_h", "granitemoehybrid"])
def test_mamba_layers_are_trained_as_by_transformers_and_adamw(name, ranks, tmp_path):
    kernels = [module for module in ("mamba_ssm", "causal_conv1d") if find_spec(module)]
    model = small_model(name, dtype="float32")
    model.config.eos_token_id = model.generation_config.eos_token_id = END
    folder = models.save(model, tmp_path / "hf")
    losses, _ = test_parity._reference(folder, FEW)
    changes = {**SHORT, "model__moe_router_bias_update_rate": 0.0, "dist__device": "gpu"}
    actual = ranks.run(small.train, 1, str(folder), changes)[0].losses
    print(f"\n{name} with {' and '.join(kernels) or 'torch alone'}: {actual}, transformers' {losses}")
    assert actual == pytest.approx(losses, abs=1e-3)  # Mamba's kernels may multiply in TF32
