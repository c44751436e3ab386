"""megatron-core's HybridModel loads what we write strictly, at any layout, and computes what transformers computes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from converter import hf_to_mcore
from converter.hybrid import with_stages
from tests import hybrid_model
from tests.converter import prediction
from tests.converter.family_suite import TOKENS, save_small, transformers_logits

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
DENSE, EXPERTS = "*-*-*-*-", "*E*E*E*E"

MODELS = {
    "llama": ("llama", DENSE, {}),
    "llama tied": ("llama", DENSE, {"tie_word_embeddings": True}),
    "llama with biases": ("llama", DENSE, {"attention_bias": True, "mlp_bias": False}),
    "gpt2": ("gpt2", DENSE, {}),
    "qwen3": ("qwen3", DENSE, {}),
    "mixtral": ("mixtral", EXPERTS, {}),
    "qwen3_moe tied": ("qwen3_moe", "*E*-*E*E", {"tie_word_embeddings": True}),
    "deepseek_v3": ("deepseek_v3", "+-+E+E+E", {"n_group": 1, "topk_group": 1}),
}
RUNS = {"tp1": ({}, [8]), "tp2 pp2 uneven": ({TP: 2, PP: 2}, [3, 5])}


@pytest.mark.parametrize("name", MODELS)
def test_a_hybrid_model_loads_strictly_and_computes_what_transformers_computes(name, ranks, tmp_path):
    family, pattern, changes = MODELS[name]
    folder = save_small(family, tmp_path / "hf", dtype="float32", **changes)
    hf_to_mcore(folder, tmp_path / "m", layout="hybrid", tp=2, pp=2, pp_layout=[5, 3], ep=2 if "E" in pattern else 1)
    check(ranks, folder, tmp_path / "m" / "iter_0000000", pattern, transformers_logits(folder))


def test_layers_of_multi_token_prediction_are_loaded_too(ranks, tmp_path):
    main, further = prediction.made("deepseek_v3", 2, n_group=1, topk_group=1)
    folder = prediction.save(tmp_path / "hf", main, further)
    hf_to_mcore(folder, tmp_path / "m", layout="hybrid", tp=2)
    with torch.no_grad():
        expected = main(torch.tensor(TOKENS)).logits.numpy()
    check(ranks, folder, tmp_path / "m" / "iter_0000000", "+-+E+E+E/+E/+E", expected)


def check(ranks, folder, iteration, pattern, expected):
    """A HybridModel of this pattern asks for just these keys, and computes these logits."""
    config = json.loads((folder / "config.json").read_text())
    for run, (sizes, stages) in RUNS.items():
        world = sizes.get(TP, 1) * sizes.get(PP, 1)
        model = config, with_stages(pattern, stages), sizes
        answers = ranks.run(hybrid_model.logits_of, world, model, str(iteration), TOKENS)
        assert all("_extra_state" in key for left, _ in answers for key in left), run
        for logits in (output for _, output in answers if output is not None):
            limit = 1e-4 * np.abs(expected).max()
            np.testing.assert_allclose(logits[..., : expected.shape[-1]], expected, atol=limit, rtol=0, err_msg=run)
