"""Adapters of experts and routers, held against PEFT: one parameter for all experts of a layer, and a module for each."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from converter import UserError
from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
from converter.adapters.merge import merge
from tests.converter.adapters.made import changed, logits, save_adapter, with_adapter
from tests.converter.family_suite import save_small

TENSORS, WEIGHTS, CONFIG = "adapter_model.safetensors", "model.safetensors", "adapter_config.json"
EXPERTS = {"target_modules": ["o_proj"],
           "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]}  # fmt: skip
DENSE = {**EXPERTS, "target_parameters": [*EXPERTS["target_parameters"], "mlp.down_proj.weight"]}
"""And a layer without experts, whose `down_proj` has to be a parameter: PEFT takes such a module for the experts'."""


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def made(request, tmp_path_factory):
    """A small model in fp32, and an adapter of its experts and routers, which PEFT saved."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_small(request.param, folder / "hf", dtype="float32")
    return base, save_adapter(base, folder / "peft", **EXPERTS)


@pytest.mark.parametrize("asked", [EXPERTS, DENSE], ids=["experts", "dense"])
def test_parameters_of_experts_come_back_to_the_bit(asked, tmp_path):
    """Without `canonical`: PEFT has one A for gate and up too."""
    base = save_small("qwen3_moe", tmp_path / "hf", dtype="float32")
    adapter = save_adapter(base, tmp_path / "peft", **asked)
    adapter_to_mcore(adapter, tmp_path / "m", base=base, canonical=False, verify=True)
    adapter_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert (tmp_path / "back" / TENSORS).read_bytes() == (adapter / TENSORS).read_bytes()
    config = json.loads((tmp_path / "back" / CONFIG).read_text())
    assert {name: set(config[name]) for name in asked} == {name: set(names) for name, names in asked.items()}


@pytest.mark.parametrize("canonical", [False, True], ids=["shared", "canonical"])
@pytest.mark.parametrize("experts", ["fused", "separate"])
def test_peft_computes_the_same_with_what_comes_back(experts, canonical, made, tmp_path):
    base, adapter = made
    adapter_to_mcore(adapter, tmp_path / "m", base=base, canonical=canonical)
    adapter_to_hf(tmp_path / "m", tmp_path / "back", experts=experts, verify=True)
    adapted = with_adapter(base, adapter)
    expected = logits(adapted)
    torch.testing.assert_close(logits(with_adapter(base, tmp_path / "back")), expected, rtol=1e-5, atol=1e-5)
    with adapted.disable_adapter():
        assert (logits(adapted) - expected).abs().max() > 0.1
    if canonical:  # what was made of two adapters is one of twice the rank
        adapter_to_mcore(tmp_path / "back", tmp_path / "again", base=base, verify=True)
        adapter_to_hf(tmp_path / "again", tmp_path / "twice", experts=experts)
        assert (tmp_path / "twice" / TENSORS).read_bytes() == (tmp_path / "back" / TENSORS).read_bytes()


def test_a_merged_model_is_what_peft_merges(made, tmp_path):
    base, adapter = made
    with_adapter(base, adapter).merge_and_unload().save_pretrained(tmp_path / "expected")
    expected, plain = load_file(tmp_path / "expected" / WEIGHTS), load_file(base / WEIGHTS)
    merge(base, adapter, tmp_path / "merged", verify=True)
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    assert merged.keys() == expected.keys()
    assert sum(not merged[name].equal(plain[name]) for name in merged) > 40
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    adapter_to_mcore(adapter, tmp_path / "m", base=base)
    adapter_to_hf(tmp_path / "m", tmp_path / "separate", experts="separate")
    for source in ("m", "separate"):
        merge(base, tmp_path / source, tmp_path / "again", to="hf", overwrite=True)
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "merged" / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_moe")
    base = save_small("qwen3_moe", folder / "hf", dtype="float32")
    adapter_to_mcore(save_adapter(base, folder / "peft", **EXPERTS), folder / "m", base=base)
    adapter_to_hf(folder / "m", folder / "separate", experts="separate")
    return base, folder


def test_vllm_finds_a_module_for_each_expert(qwen):
    """The names of vLLM's 2-D layout, from its documentation of LoRA adapters."""
    names = {name for name in load_file(qwen[1] / "separate" / TENSORS) if ".layers.0.mlp." in name}
    prefix = "base_model.model.model.layers.0.mlp"
    modules = [f"experts.{expert}.{part}_proj" for expert in range(4) for part in ("gate", "up", "down")]
    assert names == {f"{prefix}.{module}.lora_{factor}.weight" for module in [*modules, "gate"] for factor in "AB"}


def test_an_expert_without_an_adapter_is_named(qwen, tmp_path):
    base, folder = qwen
    missing = "model.layers.2.mlp.experts.3.up_proj"

    def change(tensors):
        for name in [name for name in tensors if missing in name]:
            del tensors[name]

    adapter = changed(folder / "separate", tmp_path / "a", change)
    with pytest.raises(UserError, match=missing):
        merge(base, adapter, tmp_path / "out")
    config = json.loads((adapter / CONFIG).read_text())
    config["target_modules"] = [name for name in config["target_modules"] if name != missing]
    (adapter / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{missing}.weight` has no adapter, and other experts of its layer have one"):
        adapter_to_mcore(adapter, tmp_path / "m", base=base)


def test_a_layer_that_the_file_lacks_is_named(qwen, tmp_path):
    base, folder = qwen

    def change(tensors):
        for name in [name for name in tensors if "layers.2.mlp.experts" in name]:
            del tensors[name]

    adapter = changed(folder / "peft", tmp_path / "a", change)
    for command in (lambda: merge(base, adapter, tmp_path / "o"), lambda: adapter_to_mcore(adapter, tmp_path / "o", base=base)):
        with pytest.raises(UserError, match=r"requests .* `model.layers.2.mlp.experts.0.down_proj.weight`"):
            command()


def test_adapters_of_another_number_of_experts_are_refused(qwen, tmp_path):
    base, folder = qwen

    def change(tensors):
        for name in [name for name in tensors if ".experts.lora_" in name]:
            tensors[name] = tensors[name][:12] if "lora_A" in name else tensors[name][:, :12].contiguous()

    adapter = changed(folder / "peft", tmp_path / "a", change)
    for command in (lambda: merge(base, adapter, tmp_path / "o"), lambda: adapter_to_mcore(adapter, tmp_path / "o", base=base)):
        with pytest.raises(UserError, match=r"has shape \[12, 48\] and .* \[64, 12\], .* should be \[16, 48\] and \[64, 16\]"):
            command()


def test_a_dora_of_experts_is_not_exported(qwen, tmp_path):
    """PEFT once had such, with transformers 4: a module for each expert."""
    base, folder = qwen

    def change(tensors):
        for name in [name for name in tensors if name.endswith("lora_B.weight")]:
            tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(tensors[name]))

    adapter = changed(folder / "separate", tmp_path / "a", change)
    config = (adapter / CONFIG).read_text().replace('"use_dora": false', '"use_dora": true')
    (adapter / CONFIG).write_text(config)
    adapter_to_mcore(adapter, tmp_path / "m", base=base)
    for experts in ("fused", "separate"):
        with pytest.raises(UserError, match=r"a DoRA of `model.layers.0.mlp.experts\..*`, for which PEFT has LoRA alone"):
            adapter_to_hf(tmp_path / "m", tmp_path / "back", experts=experts)


def test_an_unknown_layout_is_named(tmp_path):
    with pytest.raises(UserError, match="`experts` is `both`"):
        adapter_to_hf("m", tmp_path / "back", experts="both")
