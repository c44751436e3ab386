"""Adapters of families whose linear layers are not Llama's, held against PEFT: one tensor of query, key and value, weights stored
as [in, out], and files whose names are not those of transformers' modules."""

from __future__ import annotations

import json
import shutil
from contextlib import closing

import numpy as np
import pytest
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from converter import UserError, hf_to_mcore, mcore_to_hf, verify
from converter.adapters.adapter import Delta
from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
from converter.adapters.fingerprint import fingerprint
from converter.adapters.merge import merge
from converter.adapters.merged import MergedReader
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.spec import DTYPES
from tests.converter.adapters.made import save_adapter, with_adapter
from tests.converter.family_suite import save_small

FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "glm4": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": FUSED,
    "bloom": FUSED,
    "falcon": FUSED,
    "gpt_bigcode": ["c_attn", "c_proj", "c_fc"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gemma3": r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
    "mistral3": r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
}
"""By family, what PEFT calls all linear layers of the decoder."""

GPT2 = {"target_modules": TARGETS["gpt2"], "fan_in_fan_out": True}
TENSORS, WEIGHTS = "adapter_model.safetensors", "model.safetensors"


@pytest.fixture(scope="module", params=TARGETS)
def made(request, tmp_path_factory):
    """A small model in fp32, and an adapter of all its linear layers, which PEFT saved."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_small(request.param, folder / "hf", dtype="float32")
    options = {"target_modules": TARGETS[request.param], "fan_in_fan_out": request.param == "gpt2"}
    return base, save_adapter(base, folder / "peft", **options)


def merged_by_peft(base, adapter, folder):
    """The weights that PEFT merges, under the names of files."""
    with_adapter(base, adapter).merge_and_unload().save_pretrained(folder)
    return load_file(folder / WEIGHTS)


def test_an_adapter_comes_back_to_the_bit(made, tmp_path):
    base, adapter = made
    adapter_to_mcore(adapter, tmp_path / "m", base=base, verify=True)
    adapter_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert (tmp_path / "back" / TENSORS).read_bytes() == (adapter / TENSORS).read_bytes()
    record = json.loads((tmp_path / "m" / "iter_0000000" / "conversion.json").read_text())
    assert record["blake3"] == json.loads((tmp_path / "back" / "conversion.json").read_text())["blake3"]
    again = with_adapter(base, tmp_path / "back").state_dict()
    assert {name for name in again if "lora_" in name} == {name for name in with_adapter(base, adapter).state_dict()
                                                           if "lora_" in name}  # fmt: skip


def test_a_merged_model_is_what_peft_merges_from_either_format(made, tmp_path):
    base, adapter = made
    expected, plain = merged_by_peft(base, adapter, tmp_path / "expected"), load_file(base / WEIGHTS)
    merge(base, adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    assert merged.keys() == expected.keys()
    changed = {name for name in merged if not merged[name].equal(plain[name])}
    assert len(changed) == len(load_file(adapter / TENSORS)) // 2
    assert changed == {name for name in expected if not expected[name].equal(plain[name])}
    for name in changed:
        assert (merged[name] - expected[name]).abs().max() <= 1e-6, name
    hf_to_mcore(base, tmp_path / "base", tp=2)
    adapter_to_mcore(adapter, tmp_path / "m", base=tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "m", tmp_path / "there")
    assert verify(tmp_path / "merged", tmp_path / "there").same
    mcore_to_hf(tmp_path / "there", tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "merged" / WEIGHTS).read_bytes()


def renamed(base, folder, rename):
    """A copy of a model whose tensors have other names."""
    shutil.copytree(base, folder)
    save_file({rename(name): tensor for name, tensor in load_file(base / WEIGHTS).items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return save_small("gpt2", tmp_path_factory.mktemp("gpt2") / "hf", dtype="float32")


def test_files_without_the_prefix_of_the_modules_have_the_same_adapters(gpt2, tmp_path):
    """As GPT-2 was published: transformers' modules, and PEFT, have the prefix all the same."""
    base = renamed(gpt2, tmp_path / "hf", lambda name: name.removeprefix("transformer."))
    assert fingerprint(base) == fingerprint(gpt2)
    adapter = save_adapter(base, tmp_path / "peft", **GPT2)
    adapter_to_mcore(adapter, tmp_path / "m", base=base, verify=True)
    adapter_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert (tmp_path / "back" / TENSORS).read_bytes() == (adapter / TENSORS).read_bytes()
    expected = merged_by_peft(base, adapter, tmp_path / "expected")
    hf_to_mcore(base, tmp_path / "base")
    assert fingerprint(tmp_path / "base") == fingerprint(base)
    for base_path, adapter_path in ((base, adapter), (tmp_path / "base", tmp_path / "m")):
        merge(base_path, adapter_path, tmp_path / "merged", to="hf", overwrite=True)
        merged, plain = load_file(tmp_path / "merged" / WEIGHTS), load_file(base / WEIGHTS)
        assert merged.keys() == plain.keys()
        assert sum(not merged[name].equal(plain[name]) for name in merged) == 4 * 4
        for name, tensor in merged.items():
            assert (tensor - expected[name if name.startswith("lm_head") else f"transformer.{name}"]).abs().max() <= 1e-6, name


def test_targets_name_one_of_two_modules_with_the_same_last_name(gpt2, tmp_path):
    adapter = save_adapter(gpt2, tmp_path / "peft", **{**GPT2, "target_modules": ["c_attn", "attn.c_proj"]})
    adapter_to_mcore(adapter, tmp_path / "m", base=gpt2)
    adapter_to_hf(tmp_path / "m", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == sorted(
        f"transformer.h.{n}.attn.{module}" for n in range(4) for module in ("c_attn", "c_proj")
    )
    assert (tmp_path / "back" / TENSORS).read_bytes() == (adapter / TENSORS).read_bytes()


def test_a_dora_of_transposed_weights_converts_and_is_not_merged(gpt2, tmp_path):
    adapter = save_adapter(gpt2, tmp_path / "peft", **GPT2, use_dora=True)
    adapter_to_mcore(adapter, tmp_path / "m", base=gpt2, verify=True)
    adapter_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert (tmp_path / "back" / TENSORS).read_bytes() == (adapter / TENSORS).read_bytes()
    with pytest.raises(UserError) as refused:
        merge(gpt2, adapter, tmp_path / "merged")
    assert str(refused.value) == (
        "`transformer.h.0.attn.c_attn.weight` is stored as [in, out], into which a DoRA cannot be merged here\n\n"
        "hint: merge it with PEFT (`merge_and_unload`) and convert the merged model"
    )


def test_transposed_weights_of_an_unknown_family_are_refused(gpt2, tmp_path):
    adapter = save_adapter(gpt2, tmp_path / "peft", **GPT2)
    base = shutil.copytree(gpt2, tmp_path / "hf")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "other"}))
    with pytest.raises(UserError) as refused:
        merge(base, adapter, tmp_path / "merged")
    assert str(refused.value) == (
        "the adapter has `fan_in_fan_out: true`: some weights are stored as [in, out], and the base's `model_type`, `other`, "
        "which says which, is not supported\n\nhint: merge it with PEFT (`merge_and_unload`)"
    )


def test_an_adapter_of_a_tower_is_merged_and_has_no_place_in_megatron(tmp_path):
    base = save_small("gemma3", tmp_path / "hf", dtype="float32")
    adapter = save_adapter(base, tmp_path / "peft", target_modules=["q_proj"])
    merge(base, adapter, tmp_path / "merged")
    merged, plain = load_file(tmp_path / "merged" / WEIGHTS), load_file(base / WEIGHTS)
    expected = merged_by_peft(base, adapter, tmp_path / "expected")
    assert sum(not merged[name].equal(plain[name]) for name in merged) == 4 + 1
    assert all((merged[name] - expected[name]).abs().max() <= 1e-6 for name in merged)
    with pytest.raises(UserError, match=r"`model.vision_tower.encoder.layers.0.self_attn.q_proj.weight`, which Megatron has no"):
        adapter_to_mcore(adapter, tmp_path / "m", base=base)


def test_an_exported_adapter_of_a_language_model_asks_for_nothing_of_its_tower(tmp_path):
    base = save_small("gemma3", tmp_path / "hf", dtype="float32")
    adapter = save_adapter(base, tmp_path / "peft", target_modules=r".*language_model.*\.q_proj")
    adapter_to_mcore(adapter, tmp_path / "m", base=base)
    adapter_to_hf(tmp_path / "m", tmp_path / "back")
    adapted = [name for name in with_adapter(base, tmp_path / "back").state_dict() if "lora_A" in name]
    assert len(adapted) == 4
    assert all("language_model" in name for name in adapted)
    merge(base, tmp_path / "back", tmp_path / "merged")


def test_separate_adapters_of_one_tensor_are_refused_by_name(tmp_path):
    """As a run with `peft.canonical` saves them; here those of a model whose tensors are separate."""
    llama, phi3 = (save_small(family, tmp_path / family) for family in ("llama", "phi3"))
    adapter = save_adapter(llama, tmp_path / "peft", target_modules=["q_proj"])
    adapter_to_mcore(adapter, tmp_path / "m", base=llama)
    shutil.copy(phi3 / "config.json", tmp_path / "m" / "iter_0000000" / "huggingface" / "files" / "config.json")
    with pytest.raises(UserError) as refused:
        adapter_to_hf(tmp_path / "m", tmp_path / "back")
    assert str(refused.value) == (
        "the checkpoint holds `decoder.layers.0.self_attention.linear_qkv.adapter.adapter_q.linear_in.weight`, one of several "
        "adapters of `decoder.layers.0.self_attention.linear_qkv`, but this family has one tensor for all, "
        "`model.layers.0.self_attn.qkv_proj.weight`, and PEFT one adapter\n\n"
        "hint: train it with `peft.canonical=false`: the product of several A and B is not that of one A and one B"
    )


def test_a_region_of_some_columns_is_that_of_the_whole(tmp_path):
    """A transposed weight is read column by column. Its rows are several blocks, its columns several tiles."""
    rng = np.random.default_rng(3)
    weight, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((70, 5000), (16, 5000), (70, 16)))
    save_numpy({"w": weight}, tmp_path / "w.safetensors")
    with closing(HuggingFaceReader(LocalFolder(tmp_path), files=["w.safetensors"])) as reader:
        merged = MergedReader(reader, lambda _: Delta(a, b, 0.5), changed={"w"}, dtype="bf16")
        whole = np.empty(weight.shape, DTYPES["bf16"])
        merged.read("w", (slice(0, 70), slice(0, 5000)), whole)
        for rows, columns in ((slice(0, 70), slice(0, 7)), (slice(33, 66), slice(500, 4099)), (slice(1, 2), slice(4999, 5000))):
            part = np.empty((rows.stop - rows.start, columns.stop - columns.start), whole.dtype)
            merged.read("w", (rows, columns), part)
            assert part.tobytes() == whole[rows, columns].tobytes()
