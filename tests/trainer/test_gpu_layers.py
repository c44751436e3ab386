"""On GPUs with Transformer Engine: models with each piece of `trainer.layers`. Left out by `make test`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from converter import hf_to_mcore
from tests.converter.family_suite import TOKENS, save_small, transformers_logits
from tests.trainer import small

pytestmark = pytest.mark.gpu

WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "two_norms": ("gpt_neox", {}),
    "one_norm": ("phi", {}),
    "norms_around": ("glm4", {"head_dim": 64}),
    "norms_after_and_all_heads": ("olmo2", {}),
    "multiplier": ("granite", {}),
    "multiplier_and_norms_around": ("hyperclovax", {}),
    "one_norm_and_each_head": ("cohere", {"use_qk_norm": True}),
    "one_norm_and_each_head_with_bias": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}
RUNS = {
    "tp2": (2, {"model__tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True}),
    "pp2": (2, {"model__pipeline_model_parallel_size": 2}),
    "recompute": (1, {"model__recompute_granularity": "selective", "model__recompute_modules": ["core_attn", "layernorm"]}),
    "recompute_full": (
        1,
        {"model__recompute_granularity": "full", "model__recompute_method": "uniform", "model__recompute_num_layers": 1},
    ),
}
GPU = {"dist__device": "gpu", "mixed_precision": "fp32"}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    """A small model with one of the pieces, in fp32, that Transformer Engine's kernels take."""
    family, changes = MODELS[request.param]
    return save_small(family, tmp_path_factory.mktemp(request.param) / "hf", dtype="float32", **{**WIDE, **changes})


def _need(gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")


def _logits(source: str, config: dict[str, Any], settings: dict[str, Any]) -> np.ndarray:
    """The logits of the running model, whose weights are loaded strictly."""
    from trainer import model, parallel
    from trainer.checkpoints import live
    from trainer.config import RunConfig
    from trainer.model import from_hf_config
    from trainer.settings.resolve import resolve

    run = RunConfig(model=from_hf_config(config), mixed_precision="fp32")
    run.optimizer.lr, run.dataset.sequence_length = 1e-4, len(TOKENS[0])
    for name, value in settings.items():
        setattr(run.model, name, value)
    resolved = resolve(run, world_size=settings.get("tensor_model_parallel_size", 1), device="gpu").config
    with parallel.session(resolved, "gpu"), torch.no_grad():
        (chunk,) = model.build(resolved.model)
        chunk = chunk.eval()
        live.load([chunk], source)
        ids = torch.tensor(TOKENS, device="cuda")
        positions = torch.arange(ids.shape[1], device="cuda").expand_as(ids)
        return chunk(ids, positions, None, runtime_gather_output=True).float().cpu().numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_model_has_transformers_logits(layout, folder, ranks, tmp_path):
    gpus, settings = LAYOUTS[layout]
    _need(gpus)
    hf_to_mcore(folder, tmp_path / "megatron", tp=2)
    config, expected = json.loads((folder / "config.json").read_text()), transformers_logits(folder)
    for logits in ranks.run(_logits, gpus, str(tmp_path / "megatron"), config, settings):
        difference = np.abs(logits[..., : expected.shape[-1]] - expected).max()
        print(f"{config['model_type']} {layout}: {difference:.2e} of {np.abs(expected).max():.2f}")
        assert difference < 1e-3 * np.abs(expected).max()


@pytest.fixture(scope="module")
def alone(ranks, folder):
    """Losses of a run on one GPU."""
    (history,) = ranks.run(small.train, 1, str(folder), GPU)
    return history.losses


@pytest.mark.parametrize("layout", RUNS)
def test_a_run_has_the_losses_of_one_gpu(layout, folder, ranks, alone):
    gpus, changes = RUNS[layout]
    _need(gpus)
    for history in ranks.run(small.train, gpus, str(folder), {**GPU, **changes}):
        assert history.losses == pytest.approx(alone, abs=1e-3)
