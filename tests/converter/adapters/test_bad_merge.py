"""An adapter that does not fit its base is refused by name before anything is written."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import Reporter, UserError, hf_to_mcore, verify
from converter.adapters.convert import adapter_to_mcore
from converter.adapters.fingerprint import fingerprint
from converter.adapters.merge import merge
from tests.converter.adapters.made import save_adapter
from tests.converter.adapters.test_merge import keep_factors_alone

FILE = "adapter_model.safetensors"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(peft_folder, tmp_path):
    """An adapter that a test may damage."""
    shutil.copytree(peft_folder(target_modules=["q_proj"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, change, *, file=FILE):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


def refused(base, adapter, tmp_path, **options):
    """Return the error of a merge that writes nothing."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        merge(base, adapter, tmp_path / "merged", **options)
    assert sorted(tmp_path.iterdir()) == before
    return str(error.value)


def test_weights_that_the_base_does_not_have(base, model_folder, adapter, tmp_path):
    smaller = model_folder("gqa", num_hidden_layers=2)
    text = refused(smaller, adapter, tmp_path)
    assert (
        f"the adapter `{adapter}` changes `model.layers.2.self_attn.q_proj.weight`, `model.layers.3.self_attn.q_proj.weight`, \
which `{smaller}` does not have"
        in text
    )


def test_weights_of_another_shape(model_folder, adapter, tmp_path):
    text = refused(model_folder("head_dim"), adapter, tmp_path)
    assert "`model.layers.0.self_attn.q_proj.weight` has shape [96, 64], its adapter is for one of [64, 64]" in text
    hf_to_mcore(model_folder("head_dim"), tmp_path / "m")
    assert "has shape [96, 64], its adapter is for one of [64, 64]" in refused(tmp_path / "m", adapter, tmp_path)


def test_values_that_are_not_finite(base, adapter, tmp_path):
    edit(adapter, lambda tensors: tensors[f"{QUERY}.lora_B.weight"][3, 1].fill_(float("nan")))
    text = refused(base, adapter, tmp_path)
    assert "the adapter of `model.layers.0.self_attn.q_proj.weight` holds values that are not finite" in text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_a_base_to_which_nothing_can_be_added(base, adapter, tmp_path, dtype):
    shutil.copytree(base, tmp_path / "base")
    edit(
        tmp_path / "base", lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}), file="model.safetensors"
    )
    name = {torch.float64: "fp64", torch.float8_e4m3fn: "fp8_e4m3"}[dtype]
    text = refused(tmp_path / "base", adapter, tmp_path)
    assert f"`model.layers.0.self_attn.q_proj.weight` is {name}, to which nothing can be added" in text


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_a_tied_output_layer(base, model_folder, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    keep_factors_alone(adapter)
    text = refused(model_folder("tied"), adapter, tmp_path)
    assert "changes `lm_head.weight`, but `config.json` ties `lm_head.weight` to `model.embed_tokens.weight`" in text


def test_another_base_than_it_was_trained_beside(base, model_folder, peft_folder, tmp_path):
    other = model_folder("gqa", seed=1)
    adapter_to_mcore(peft_folder(), tmp_path / "a", base=base)
    text = refused(other, tmp_path / "a", tmp_path)
    assert text.startswith(
        f"the adapter was trained on `{base}`, whose fingerprint is {fingerprint(base)}; that of `{other}` is "
        f"{fingerprint(other)}"
    )
    merge(other, tmp_path / "a", tmp_path / "any", allow_other_base=True)
    merge(other, peft_folder(), tmp_path / "expected")
    assert verify(tmp_path / "any", tmp_path / "expected").same


def test_the_base_may_be_kept_in_the_other_format(base, peft_folder, tmp_path):
    adapter_to_mcore(peft_folder(), tmp_path / "a", base=base)
    hf_to_mcore(base, tmp_path / "m", tp=2)
    notes = []
    merge(tmp_path / "m", tmp_path / "a", tmp_path / "merged", reporter=Reporter(note=notes.append))
    assert notes == []


def test_pefts_own_files_do_not_tell_and_that_is_said(base, adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/name"}))
    notes = []
    merge(base, adapter, tmp_path / "merged", reporter=Reporter(note=notes.append))
    assert notes == [
        "the adapter has no fingerprint of its base (it names `org/name`): whether it was trained on this one is not checked"
    ]


@pytest.mark.parametrize(("options", "text"), [
    ({"to": "hf", "tp": 2}, "`tp` is 2, which has no effect if the target is a Hugging Face directory"),
    ({"to": "mcore", "max_shard_size": 10}, "`max_shard_size` is 10, which has no effect if the target is a Megatron checkpoint"),
    ({"to": "gguf"}, "the target's format `gguf` is not one of hf, mcore"),
    ({"workers": 0}, "`workers` is 0, which should be 1 to 256"),
    ({"to": "mcore", "tp": 3}, "tensor-parallel size 3 neither divides the model's 4 query groups nor is a multiple of them"),
])  # fmt: skip
def test_options_of_the_other_format(base, adapter, tmp_path, options, text):
    assert text in refused(base, adapter, tmp_path, **options)


def test_a_target_that_is_the_base_or_the_adapter(base, adapter, tmp_path):
    for target in (base, adapter):
        with pytest.raises(UserError, match=re.escape(str(target))):
            merge(base, adapter, target, overwrite=True)
    assert (adapter / FILE).exists()


def test_a_config_for_a_base_that_has_one(base, adapter, tmp_path):
    assert "`--hf-config` is for a source without a `config.json`" in refused(base, adapter, tmp_path, hf_config=base)


def test_a_bias_that_megatron_was_to_keep_zero_and_did_not(model_folder, tmp_path, monkeypatch):
    """A base in Megatron's format is checked as an export of it is."""
    base = model_folder("attention_bias")
    adapter = save_adapter(base, tmp_path / "adapter")
    hf_to_mcore(model_folder("both_biases"), tmp_path / "m")
    text = refused(tmp_path / "m", adapter, tmp_path, hf_config=base)
    assert "is not zero any more, but `config.json` has no place for it" in text
