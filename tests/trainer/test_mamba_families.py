"""Models with Mamba layers are trained on the CPU as transformers and torch's AdamW train them, and go on where they stopped."""

from __future__ import annotations

import pytest
import torch

from converter import mcore_to_hf
from tests import models
from tests.converter.family_suite import small_model
from tests.trainer import small, witness
from tests.trainer.small import STEPS
from tests.trainer.test_family_training import END, FEW, TP2, saved, steps_are_those_of_transformers
from tests.trainer.test_generation import answers, tokens, transformers_tokens

QUICK = ("mamba2", "nemotron_h")
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*QUICK, "bamba", "granitemoehybrid")]
SHORT = {"train__train_iters": FEW, "scheduler__lr_decay_iters": STEPS, "model__moe_router_bias_update_rate": 0.0}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return saved(small_model(request.param, dtype="float32"), tmp_path_factory.mktemp(request.param) / "hf")


def test_a_few_steps_are_those_of_transformers_and_adamw(folder, ranks):
    steps_are_those_of_transformers(folder, ranks, SHORT)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder, ranks, tmp_path):
    whole = ranks.run(witness.train, 2, str(folder), {**SHORT, **TP2})
    settings = {**SHORT, **TP2, "checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    ranks.run(witness.train, 2, str(folder), {**settings, "train__exit_interval": 2})
    for uninterrupted, resumed in zip(whole, ranks.run(witness.train, 2, str(folder), settings), strict=True):
        assert resumed.losses == uninterrupted.losses[2:]
        assert witness.differences(uninterrupted.left, resumed.left) == []


def test_decay_stays_in_fp32_where_all_else_is_in_bf16(ranks, tmp_path):
    folder = models.save(small_model("mamba2", dtype="float32", eos_token_id=END), tmp_path / "hf")
    settings = {**SHORT, "mixed_precision": "bf16_mixed", "ddp__use_distributed_optimizer": True}
    whole = ranks.run(witness.train, 2, str(folder), settings)
    settings |= {"checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    ranks.run(witness.train, 2, str(folder), {**settings, "train__exit_interval": 2})
    for uninterrupted, resumed in zip(whole, ranks.run(witness.train, 2, str(folder), settings), strict=True):
        assert witness.differences(uninterrupted.left, resumed.left) == []
        in_fp32 = {name.rpartition(".")[2] for name, weight in resumed.weights.items() if weight.dtype == torch.float32}
        assert in_fp32 == {"A_log", "D"}


def test_generated_tokens_are_those_of_transformers(folder, ranks):
    expected = [[token for token in row if token != END] for row in transformers_tokens(folder)]
    for world, layout in ((1, ()), (2, ("model.tensor_model_parallel_size=2",))):
        assert tokens(ranks.run(answers, world, str(folder), layout)[-1]) == expected


def test_what_a_run_saves_is_exported_as_the_model_that_it_began_with(folder, ranks, tmp_path):
    still = {"train__train_iters": 1, "optimizer__lr": 0.0, "optimizer__min_lr": 0.0, "scheduler__lr_warmup_iters": 0}
    ranks.run(small.train, 2, str(folder), {**SHORT, **still, **TP2, "checkpoint__save": str(tmp_path / "run")})
    mcore_to_hf(tmp_path / "run", tmp_path / "back")
    assert models.model_tree(tmp_path / "back") == models.model_tree(folder)
