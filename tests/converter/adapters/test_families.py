"""Adapters of families whose linear layers are not Llama's, held against PEFT: tensors that hold query, key and value."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from converter import hf_to_mcore, mcore_to_hf, verify
from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
from converter.adapters.merge import merge
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
}
"""By family, the last names of all linear layers of the decoder."""

TENSORS, WEIGHTS = "adapter_model.safetensors", "model.safetensors"


@pytest.fixture(scope="module", params=TARGETS)
def made(request, tmp_path_factory):
    """A small model in fp32, and an adapter of all its linear layers, which PEFT saved."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_small(request.param, folder / "hf", dtype="float32")
    return base, save_adapter(base, folder / "peft", target_modules=TARGETS[request.param])


def merged_by_peft(base, adapter, folder):
    """The weights that PEFT merges, under the names of files."""
    with_adapter(base, adapter).merge_and_unload().save_pretrained(folder)
    return load_file(folder / WEIGHTS)


def test_an_adapter_comes_back_to_the_bit(made, tmp_path):
    base, adapter = made
    adapter_to_mcore(adapter, tmp_path / "m", base=base, verify=True)
    adapter_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert (tmp_path / "back" / TENSORS).read_bytes() == (adapter / TENSORS).read_bytes()
    there = json.loads((tmp_path / "m" / "iter_0000000" / "conversion.json").read_text())
    assert there["blake3"] == json.loads((tmp_path / "back" / "conversion.json").read_text())["blake3"]
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
