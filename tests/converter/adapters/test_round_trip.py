"""PEFT's adapters to Megatron and back: the same bytes, and the same model by PEFT's own account."""

from __future__ import annotations

import json

import pytest
import torch

from converter import UserError
from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
from tests.converter.adapters.made import EVERY, logits, with_adapter

UNEVEN = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "two targets": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "two layers": {"target_modules": ["k_proj", "o_proj", "gate_proj"], "layers_to_transform": [1, 3]},
    "uneven": {"target_modules": UNEVEN},
    "pattern": {"target_modules": r".*layers\.[02]\..*(q|down)_proj"},
    "bf16": {"dtype": "bfloat16"},
}
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_comes_back_with_the_same_bytes_and_computes_the_same(peft_folder, base, tmp_path, kind):
    folder = peft_folder(**KINDS[kind])
    adapter_to_mcore(folder, tmp_path / "m", base=base, verify=True)
    adapter_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    before, after = with_adapter(base, folder), with_adapter(base, tmp_path / "back")
    assert {name for name, _ in before.named_parameters()} == {name for name, _ in after.named_parameters()}
    assert torch.equal(logits(before), logits(after))
    plain = logits(before.unload())
    assert (logits(after) - plain).abs().max() > 0.5, "an adapter that does nothing proves nothing"


@pytest.mark.parametrize("kind", [{}, {"use_dora": True, "dtype": "bfloat16"}, {"target_modules": EVERY[:3]}])
def test_equal_a_become_one_and_come_back(peft_folder, base, tmp_path, kind):
    folder = peft_folder(equal_a=True, **kind)
    adapter_to_mcore(folder, tmp_path / "m", base=base, canonical=False, verify=True)
    adapter_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert torch.equal(logits(with_adapter(base, folder)), logits(with_adapter(base, tmp_path / "back")))


def test_different_a_cannot_become_one(peft_folder, base, tmp_path):
    with pytest.raises(UserError) as refused:
        adapter_to_mcore(peft_folder(), tmp_path / "m", base=base, canonical=False)
    q, k = (f"base_model.model.model.layers.0.self_attn.{name}_proj.lora_A.weight" for name in "qk")
    assert str(refused.value) == (
        f"`{q}` and `{k}` differ, but a fused adapter of `decoder.layers.0.self_attention.linear_qkv` has one A for both\n\n"
        "hint: convert with `--canonical`, which keeps separate adapters"
    )
    assert not list(tmp_path.iterdir())


def test_a_fused_adapter_needs_all_its_parts(peft_folder, base, tmp_path):
    folder = peft_folder(target_modules=["q_proj", "v_proj"], equal_a=False)
    with pytest.raises(UserError, match=r"`decoder.layers.0.self_attention.linear_qkv` is one module, .*0.self_attn.k_proj"):
        adapter_to_mcore(folder, tmp_path / "m", base=base, canonical=False)


def test_the_hashes_of_both_records_are_the_same(peft_folder, base, tmp_path):
    adapter_to_mcore(peft_folder(equal_a=True), tmp_path / "m", base=base, canonical=False)
    adapter_to_hf(tmp_path / "m", tmp_path / "back")
    imported = json.loads((tmp_path / "m" / "iter_0000000" / "conversion.json").read_text())
    exported = json.loads((tmp_path / "back" / "conversion.json").read_text())
    assert imported["blake3"] == exported["blake3"]
    assert len(imported["blake3"]) == 4 * 7 * 2


def test_the_checkpoint_says_what_it_is(peft_folder, base, tmp_path):
    adapter_to_mcore(peft_folder(use_dora=True, lora_dropout=0.1), tmp_path / "m", base=base)
    description = json.loads((tmp_path / "m" / "iter_0000000" / "adapter.json").read_text())
    assert description.pop("base")["name"] == str(base)
    assert description == {
        "method": "dora", "dim": 4, "alpha": 8, "use_rslora": False, "canonical": True, "dropout": 0.1, "exclude_modules": [],
        "target_modules": ["linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1_gate", "linear_fc1_up", "linear_fc2"],
    }  # fmt: skip


def test_a_megatron_checkpoint_is_a_base_too(peft_folder, base, tmp_path):
    from converter import hf_to_mcore

    hf_to_mcore(base, tmp_path / "base", tp=2)
    adapter_to_mcore(peft_folder(), tmp_path / "one", base=base)
    adapter_to_mcore(peft_folder(), tmp_path / "other", base=tmp_path / "base")
    first, second = (json.loads((tmp_path / m / "iter_0000000" / "adapter.json").read_text()) for m in ("one", "other"))
    assert first["base"]["fingerprint"] == second["base"]["fingerprint"]
    adapter_to_hf(tmp_path / "other", tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (peft_folder() / WEIGHTS).read_bytes()


def test_an_output_is_replaced_only_when_asked(peft_folder, base, tmp_path):
    adapter_to_mcore(peft_folder(), tmp_path / "m", base=base)
    with pytest.raises(UserError, match="already exists"):
        adapter_to_mcore(peft_folder(), tmp_path / "m", base=base)
    adapter_to_mcore(peft_folder(use_dora=True), tmp_path / "m", base=base, overwrite=True)
    adapter_to_hf(tmp_path / "m", tmp_path / "back")
    adapter_to_hf(tmp_path / "m", tmp_path / "back", overwrite=True)
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (peft_folder(use_dora=True) / WEIGHTS).read_bytes()
