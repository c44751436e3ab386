"""What is not of one family's making works in others too: verify, inspect, servers, resume, adapters and merging.

The central case of each; the suites go through the rest with a Llama. Qwen2 has biases, Qwen3 a norm over each head, Phi-3 one
tensor of query, key and value, GPT-2 weights stored as [in, out].
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import hf_to_mcore, inspect, mcore_to_hf, verify
from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
from converter.adapters.merge import merge
from tests.converter.adapters.made import EVERY, logits, save_adapter, with_adapter
from tests.converter.family_suite import save_small
from tests.interrupted import Conversion
from tests.locations import served
from tests.models import model_tree, tree

WEIGHTS = "model.safetensors"


KEY = "model.layers.2.self_attn.k_proj.weight"
FAMILIES = {
    "llama": (KEY, EVERY),
    "qwen2": (KEY, EVERY),
    "qwen3": (KEY, EVERY),
    "phi3": ("model.layers.2.self_attn.qkv_proj.weight", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt2": ("transformer.h.2.attn.c_attn.weight", ["c_attn", "c_proj", "c_fc"]),
}
"""Of each a weight, and the last names of all linear layers of the decoder."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """A small model in fp32. Not to be written into."""
    return save_small(family, tmp_path_factory.mktemp(family) / "hf", dtype="float32")


@pytest.fixture(scope="module")
def adapter(family, folder, tmp_path_factory):
    options = {"target_modules": FAMILIES[family][1], "fan_in_fan_out": family == "gpt2"}
    return save_adapter(folder, tmp_path_factory.mktemp("adapter") / "peft", **options)


def test_a_difference_is_placed_in_the_tensor_of_hugging_face(family, folder, tmp_path):
    hf_to_mcore(folder, tmp_path / "m", tp=2, pp=2)
    assert verify(folder, tmp_path / "m").same
    shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(folder / WEIGHTS)
    name = FAMILIES[family][0]
    tensors[name][3, 5] += 1
    save_file(tensors, tmp_path / "copy" / WEIGHTS, {"format": "pt"})
    (difference,) = verify(tmp_path / "copy", tmp_path / "m").different
    assert (difference.name, difference.first) == (name, (3, 5))


def test_inspect_names_the_family_on_both_sides(family, folder, tmp_path):
    hf_to_mcore(folder, tmp_path / "m", tp=2, make_vocab_size_divisible_by=64)
    count = sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())
    for report in (inspect(folder), inspect(tmp_path / "m")):
        assert (report.family, report.layers, report.parameters) == (family, 4, count)
    assert inspect(tmp_path / "m").layout == {"tp": 2, "pp": 1}


@pytest.mark.usefixtures("at_home")
def test_a_server_gives_the_same_bytes_both_ways(folder, monkeypatch, moto, tmp_path):
    with served("http", tree(folder), monkeypatch, moto) as server:
        hf_to_mcore(server.url, tmp_path / "m", tp=2, pp=2, verify=True)
    assert verify(folder, tmp_path / "m").same
    with served("http", tree(tmp_path / "m"), monkeypatch, moto) as server:
        mcore_to_hf(server.url, tmp_path / "back")
    assert model_tree(tmp_path / "back") == tree(folder)


def test_a_killed_conversion_is_resumed_to_the_same_bytes(folder, tmp_path):
    words = ("hf-to-mcore", folder, tmp_path / "m", "--tp", 2, "--pp", 2)
    killed = Conversion(*words, log=tmp_path / "log", hold={"write": 20})
    killed.until("write", 20)
    killed.stop()
    assert not (tmp_path / "m").exists()
    assert Conversion(*words, "--resume", log=tmp_path / "again").end()[0] == 0
    hf_to_mcore(folder, tmp_path / "straight", tp=2, pp=2)
    assert tree(tmp_path / "m") == tree(tmp_path / "straight")


def test_an_adapter_comes_back_to_the_bit_and_computes_the_same(folder, adapter, tmp_path):
    adapter_to_mcore(adapter, tmp_path / "m", base=folder, verify=True)
    adapter_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    file = "adapter_model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (adapter / file).read_bytes()
    adapted = with_adapter(folder, tmp_path / "back")
    assert torch.equal(logits(with_adapter(folder, adapter)), logits(adapted))
    assert (logits(adapted) - logits(adapted.unload())).abs().max() > 0.1


def test_a_merged_model_is_what_peft_merges(family, folder, adapter, tmp_path):
    merge(folder, adapter, tmp_path / "merged")
    expected = with_adapter(folder, adapter).merge_and_unload().state_dict()
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    plain = load_file(folder / WEIGHTS)
    assert sum(not torch.equal(merged[name], plain[name]) for name in merged) == 4 * {"phi3": 4, "gpt2": 4}.get(family, 7)
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor.numpy(), expected[name].numpy(), rtol=0, atol=1e-6, err_msg=name)
