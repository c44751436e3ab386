"""Adapters of experts whose weights are one tensor in files, held against PEFT, which adapts that tensor as a parameter."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from converter import UserError, hf_to_mcore, mcore_to_hf, verify
from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
from converter.adapters.fingerprint import fingerprint
from converter.adapters.merge import merge
from tests.converter.adapters.made import changed, logits, save_adapter, with_adapter
from tests.converter.family_suite import save_small
from tests.converter.test_prediction_qwen import stacked

TENSORS, WEIGHTS, CONFIG = "adapter_model.safetensors", "model.safetensors", "adapter_config.json"
BLOCKS = {
    "gpt_oss": "mlp",
    "llama4_text": "feed_forward",
    "granitemoe": "block_sparse_moe",
    "granitemoehybrid": "block_sparse_moe",
}
"""By family, what transformers calls the block of experts. GPT-OSS's gate and up projection alternate; PEFT takes the inputs of
Llama 4's parameters for outputs; Granite's have other names in files."""


def targets(family):
    """All experts and routers, and one layer that is a module."""
    names = ("experts.gate_up_proj", "experts.down_proj", "router.weight")
    return {"target_modules": ["o_proj"], "target_parameters": [f"{BLOCKS[family]}.{name}" for name in names]}


@pytest.fixture(scope="module", params=BLOCKS)
def made(request, tmp_path_factory):
    """A small model in fp32, and an adapter of its experts and routers, which PEFT saved."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_small(request.param, folder / "hf", dtype="float32")
    return request.param, base, save_adapter(base, folder / "peft", **targets(request.param))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt_oss")
    base = save_small("gpt_oss", folder / "hf", dtype="float32")
    return base, save_adapter(base, folder / "peft", **targets("gpt_oss"))


def test_an_adapter_comes_back_to_the_bit_and_computes_the_same(made, tmp_path):
    family, base, adapter = made
    adapter_to_mcore(adapter, tmp_path / "m", base=base, verify=True)
    adapter_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert (tmp_path / "back" / TENSORS).read_bytes() == (adapter / TENSORS).read_bytes()
    config = json.loads((tmp_path / "back" / CONFIG).read_text())
    assert set(config["target_parameters"]) == set(targets(family)["target_parameters"])
    adapted = with_adapter(base, tmp_path / "back")
    expected = logits(adapted)
    assert logits(with_adapter(base, adapter)).equal(expected)
    with adapted.disable_adapter():
        assert (logits(adapted) - expected).abs().max() > 0.1


def test_a_merged_model_is_what_peft_merges_from_either_format(made, tmp_path):
    _, base, adapter = made
    with_adapter(base, adapter).merge_and_unload().save_pretrained(tmp_path / "expected")
    expected, plain = load_file(tmp_path / "expected" / WEIGHTS), load_file(base / WEIGHTS)
    merge(base, adapter, tmp_path / "merged", verify=True)
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    assert merged.keys() == expected.keys()
    assert sum(not merged[name].equal(plain[name]) for name in merged) == len(load_file(adapter / TENSORS)) // 2
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    hf_to_mcore(base, tmp_path / "base", tp=2, ep=2)
    adapter_to_mcore(adapter, tmp_path / "m", base=tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "m", tmp_path / "there", ep=2)
    assert verify(tmp_path / "merged", tmp_path / "there").same
    mcore_to_hf(tmp_path / "there", tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "merged" / WEIGHTS).read_bytes()


def tensors_of_experts(checkpoint):
    """The weights, and those of adapters, in a Megatron checkpoint, as torch loads them."""
    reader = dcp.FileSystemReader(checkpoint / "iter_0000000")
    entries = reader.read_metadata().state_dict_metadata.items()
    state = {key: torch.empty(entry.size) for key, entry in entries if ".experts." in key and key.endswith("weight")}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def test_b_times_a_of_megatron_s_tensors_is_what_is_added_to_megatron_s_weights(gpt_oss, tmp_path):
    base, adapter = gpt_oss
    with_adapter(base, adapter).merge_and_unload().save_pretrained(tmp_path / "expected")
    for name in ("base", "expected"):
        hf_to_mcore(base if name == "base" else tmp_path / name, tmp_path / f"{name}.m")
    adapter_to_mcore(adapter, tmp_path / "m", base=base)
    plain, expected, factors = (tensors_of_experts(tmp_path / name) for name in ("base.m", "expected.m", "m"))
    assert len(factors) == 4 * 2 * 2
    for module in ("linear_fc1", "linear_fc2"):
        for layer in range(4):
            start = f"decoder.layers.{layer}.mlp.experts.experts.{module}.adapter"
            a, b = (factors[f"{start}.linear_{way}.weight"] for way in ("in", "out"))
            key = f"decoder.layers.mlp.experts.experts.{module}.weight"
            torch.testing.assert_close(expected[key][layer], plain[key][layer] + 2 * (b @ a), rtol=0, atol=1e-5)


def test_a_base_in_bf16_is_rounded_once(gpt_oss, tmp_path):
    base, adapter = save_small("gpt_oss", tmp_path / "hf"), gpt_oss[1]
    merge(base, adapter, tmp_path / "bf16")
    merge(base, adapter, tmp_path / "fp32", dtype="fp32")
    exact, plain = load_file(tmp_path / "fp32" / WEIGHTS), load_file(base / WEIGHTS)
    for name, tensor in load_file(tmp_path / "bf16" / WEIGHTS).items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.equal(exact[name].bfloat16())
        assert tensor.equal(plain[name]) == (not name.endswith(("o_proj.weight", "router.weight", "gate_up_proj", "down_proj")))


def test_a_module_for_each_expert_is_not_written(gpt_oss, tmp_path):
    base, adapter = gpt_oss
    adapter_to_mcore(adapter, tmp_path / "m", base=base)
    with pytest.raises(UserError) as refused:
        adapter_to_hf(tmp_path / "m", tmp_path / "back", experts="separate")
    assert str(refused.value) == (
        "the checkpoint has adapters for `model.layers.0.mlp.experts.gate_up_proj`, one parameter of all experts, and no program "
        "has a module for each expert in this family\n\nhint: `--experts fused`, the default, writes what PEFT and vLLM read"
    )


def test_an_adapter_of_attention_alone_has_both_layouts(gpt_oss, tmp_path):
    adapter = save_adapter(gpt_oss[0], tmp_path / "peft", target_modules=["q_proj"])
    adapter_to_mcore(adapter, tmp_path / "m", base=gpt_oss[0])
    for experts in ("fused", "separate"):
        adapter_to_hf(tmp_path / "m", tmp_path / experts, experts=experts)
        assert (tmp_path / experts / TENSORS).read_bytes() == (adapter / TENSORS).read_bytes()


def refused_by_both(adapter, base, tmp_path, message):
    for command in (lambda: merge(base, adapter, tmp_path / "o"), lambda: adapter_to_mcore(adapter, tmp_path / "o", base=base)):
        with pytest.raises(UserError, match=message):
            command()


def test_a_layer_that_the_file_lacks_is_named(gpt_oss, tmp_path):
    def change(tensors):
        for name in [name for name in tensors if "layers.2.mlp.experts" in name]:
            del tensors[name]

    adapter = changed(gpt_oss[1], tmp_path / "a", change)
    refused_by_both(adapter, gpt_oss[0], tmp_path, r"requests .* `model.layers.2.mlp.experts.down_proj\[0\]`, .* and \d more")


def test_adapters_of_another_number_of_experts_are_refused(gpt_oss, tmp_path):
    def change(tensors):
        for name in [name for name in tensors if ".experts.lora_" in name]:
            tensors[name] = tensors[name][:12] if "lora_A" in name else tensors[name][:, :12].contiguous()

    adapter = changed(gpt_oss[1], tmp_path / "a", change)
    refused_by_both(adapter, gpt_oss[0], tmp_path, r"shape \[12, 96\] and .* \[64, 12\], .* should be \[16, 96\] and \[64, 16\]")


def test_rows_of_all_experts_in_one_matrix_are_refused_by_name(tmp_path):
    """DBRX: PEFT has one A for all experts."""
    base = save_small("dbrx", tmp_path / "hf", dtype="float32")
    adapter = save_adapter(base, tmp_path / "peft", target_modules=["out_proj"], target_parameters=["mlp.w1", "mlp.w2"])
    message = "changes `transformer.blocks.0.ffn.experts.mlp.w1`, a parameter of all experts that this family does not store"
    refused_by_both(adapter, base, tmp_path, message)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A model of Qwen3.5 with a weight for each expert, as transformers saves it, its twin with one tensor of all, as published,
    and an adapter."""
    folder = tmp_path_factory.mktemp("qwen")
    single = save_small("qwen3_5_moe_text", folder / "single", dtype="float32")
    whole = shutil.copytree(single, folder / "whole")
    save_file(stacked(load_file(single / WEIGHTS)), whole / WEIGHTS, {"format": "pt"})
    adapter = save_adapter(single, folder / "peft", target_modules=["o_proj"],
                           target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])  # fmt: skip
    return single, whole, adapter


def test_a_base_with_one_tensor_of_all_experts_is_the_one_that_has_a_weight_for_each(qwen, tmp_path):
    single, whole, adapter = qwen
    assert fingerprint(whole) == fingerprint(single)
    merge(single, adapter, tmp_path / "expected")
    expected = stacked(load_file(tmp_path / "expected" / WEIGHTS))
    adapter_to_mcore(adapter, tmp_path / "m", base=whole)
    adapter_to_hf(tmp_path / "m", tmp_path / "twice")
    adapter_to_hf(tmp_path / "m", tmp_path / "separate", experts="separate")
    plain = load_file(whole / WEIGHTS)
    for source in (adapter, tmp_path / "m", tmp_path / "twice", tmp_path / "separate"):
        merge(whole, source, tmp_path / "merged", overwrite=True)
        merged = load_file(tmp_path / "merged" / WEIGHTS)
        assert merged.keys() == expected.keys() == plain.keys()
        assert sum(not merged[name].equal(plain[name]) for name in merged) == len(load_file(adapter / TENSORS)) // 2
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("experts", ["fused", "separate"])
def test_a_layer_that_an_adapter_for_such_a_base_lacks_is_named(qwen, tmp_path, experts):
    _, whole, adapter = qwen
    adapter_to_mcore(adapter, tmp_path / "m", base=whole)
    adapter_to_hf(tmp_path / "m", tmp_path / "peft", experts=experts)

    def change(tensors):
        for name in [name for name in tensors if "layers.2.mlp.experts" in name]:
            del tensors[name]

    with pytest.raises(UserError, match=r"requests changes of `model.layers.2.mlp.experts.down_proj\[0\]`"):
        merge(whole, changed(tmp_path / "peft", tmp_path / "a", change), tmp_path / "o")


@pytest.fixture(scope="module")
def separate(qwen, tmp_path_factory):
    """The same adapter as a module for each expert."""
    folder = tmp_path_factory.mktemp("separate")
    adapter_to_mcore(qwen[2], folder / "m", base=qwen[1])
    adapter_to_hf(folder / "m", folder / "peft", experts="separate")
    return folder / "peft"


def unit_magnitudes(tensors):
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(tensors[name]))


HINT = "\n\nhint: transformers' `save_pretrained` writes such a base with a weight for each expert: merge into that"
REFUSED = {
    "scales": (
        {"alpha_pattern": {"experts.3.up_proj": 2}},
        (
            "`model.layers.0.mlp.experts.3.up_proj.weight` and `model.layers.0.mlp.experts.0.gate_proj.weight` have adapters of "
            "different ranks or scales, and the base has one tensor for both"
        ),
    ),
    "dora": (
        {"use_dora": True},
        (
            "the adapter is a DoRA of `model.layers.0.mlp.experts.0.gate_proj.weight`, and the base has one tensor of all "
            "experts, into which none is merged"
        ),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_one_tensor_of_all_experts_cannot_take_is_refused(qwen, separate, tmp_path, kind):
    fields, message = REFUSED[kind]
    adapter = changed(separate, tmp_path / "a", unit_magnitudes if kind == "dora" else dict)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | fields))
    with pytest.raises(UserError) as refused:
        merge(qwen[1], adapter, tmp_path / "o")
    assert str(refused.value) == message + HINT
