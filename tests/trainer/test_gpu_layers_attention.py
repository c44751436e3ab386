"""On GPUs with Transformer Engine: pieces of attention and of the ends of a model train as on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.layers import runs
from tests.trainer.layers.test_attention_pieces import MODELS

pytestmark = pytest.mark.gpu

GPU = {"dist__device": "gpu"}
TP2 = {"model__tensor_model_parallel_size": 2}
LAYOUTS = {"tp1": {}, "tp2": TP2, "tp2_sp": {**TP2, "model__sequence_parallel": True}}


@pytest.fixture(scope="module")
def weights(ranks, tmp_path_factory):
    """Weights of each model, and what the CPU's layers saw that trained them on."""
    known = {}

    def find(name):
        if name not in known:
            folder = runs.make(ranks, MODELS[name], tmp_path_factory.mktemp(name) / "run")
            known[name] = folder, ranks.run(runs.train, 1, MODELS[name], runs.start(folder))[0]
        return known[name]

    return find


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_transformer_engine_s_layers_train_as_those_of_the_cpu(name, layout, ranks, weights):
    world = 1 if layout == "tp1" else 2
    if torch.cuda.device_count() < world:
        pytest.skip("needs two GPUs")
    folder, cpu = weights(name)
    for gpu in ranks.run(runs.train, world, MODELS[name], runs.start(folder, **GPU, **LAYOUTS[layout])):
        print(f"{name} {layout}: losses {gpu.losses}, on the CPU {cpu.losses}; norms {gpu.grad_norms}, {cpu.grad_norms}")
        assert gpu.losses == pytest.approx(cpu.losses, abs=1e-3)
        assert gpu.grad_norms == pytest.approx(cpu.grad_norms, rel=1e-3)
