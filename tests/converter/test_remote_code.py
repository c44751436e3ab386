"""Repositories whose code transformers would have to run: weights are converted by names alone, and no code is run."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from converter import hf_to_mcore, mcore_to_hf
from tests.converter import remote_code
from tests.converter.family_suite import TOKENS, random_model, save_small
from tests.family_models import logits_of
from tests.models import BASE, model_tree
from tests.programs import run_module


@pytest.mark.parametrize("family", remote_code.TWINS)
def test_a_repository_s_code_is_carried_and_never_run(family, tmp_path):
    folder = save_small(family, tmp_path / "hf")
    for command, source, target in (("hf-to-mcore", folder, tmp_path / "m"), ("mcore-to-hf", tmp_path / "m", tmp_path / "back")):
        done = run_module("converter", command, str(source), str(target))
        assert done.returncode == 0, done.stderr
        assert "must never run" not in done.stdout + done.stderr
    assert (tmp_path / "back" / f"modeling_{family}.py").read_text() == remote_code.CODE
    assert model_tree(tmp_path / "back") == model_tree(folder)
    assert f"modeling_{family}" not in sys.modules


def slopes(heads):
    """ALiBi's slopes for a number of heads that is a power of 2."""
    return torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)])


def by_llama_without_positions(folder):
    """Llama at position 0 everywhere, which turns nothing, with ALiBi as a mask that is added to the scores."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    length = len(TOKENS[0])
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    positions = torch.zeros(len(TOKENS), length, dtype=torch.long)
    mask = slopes(8)[:, None, None] * distance.float()
    mask = mask.masked_fill(distance > 0, torch.finfo(torch.float32).min)[None].expand(len(TOKENS), -1, -1, -1)
    with torch.no_grad():
        return model(torch.tensor(TOKENS), attention_mask=mask, position_ids=positions).logits.numpy()


def test_baichuan_13b_has_alibi(ranks, tmp_path):
    twin = remote_code.twin_of(tmp_path / "hf")
    sizes = {**BASE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 40, "num_key_value_heads": 8}
    random_model(AutoConfig.for_model("llama", **sizes), dtype="float32").save_pretrained(twin)
    published = {name: size for name, size in sizes.items() if name != "max_position_embeddings"}
    remote_code.publish("baichuan", {**published, "model_max_length": 256}, twin, tmp_path / "hf")
    hf_to_mcore(tmp_path / "hf", tmp_path / "m", tp=2)
    config, expected = json.loads((tmp_path / "hf" / "config.json").read_text()), by_llama_without_positions(twin)
    for settings in ({}, {"tensor_model_parallel_size": 2}):
        world = settings.get("tensor_model_parallel_size", 1)
        (_, logits), *_ = ranks.run(logits_of, world, (config, settings, ""), str(tmp_path / "m" / "iter_0000000"), TOKENS)
        np.testing.assert_allclose(logits[..., : expected.shape[-1]], expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(tmp_path / "hf" / "model.safetensors").keys()
    assert model_tree(tmp_path / "back") == model_tree(tmp_path / "hf")
