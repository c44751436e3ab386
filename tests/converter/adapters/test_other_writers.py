"""Adapters written by other programs than PEFT's `save_pretrained`, and adapters given to the wrong command.

Each error names what was found, and following its hint works.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
from safetensors import torch as safetensors_torch
from safetensors.torch import load_file, save_file

from converter import UserError, hf_to_mcore, mcore_to_hf, verify
from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
from converter.adapters.merge import merge

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(peft_folder, tmp_path):
    shutil.copytree(peft_folder(), tmp_path / "adapter")
    return tmp_path / "adapter"


def rename(folder, new):
    save_file({new(name): weight for name, weight in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, {"format": "pt"})


def message(action, *paths, **options):
    with pytest.raises(UserError) as error:
        action(*paths, **options)
    return str(error.value)


RENAMED = {
    "default": (lambda n: re.sub(r"\.weight$", ".default.weight", n), "with the name of the adapter (`default`) in it"),
    "its own name": (lambda n: re.sub(r"\.weight$", ".my-style.weight", n), "with the name of the adapter (`my-style`) in it"),
    "none": (lambda n: n.removeprefix("base_model.model."), "with the prefix `model.` where PEFT has `base_model.model.model.`"),
    "half": (lambda n: n.removeprefix("base_model."), "with the prefix `model.model.` where PEFT has"),
    "bare": (lambda n: n.removeprefix("base_model.model.model."), "with no prefix where PEFT has `base_model.model.model.`"),
    "diffusion": (lambda n: f"transformer.{n}", "where PEFT has `base_model.model.model.`"),
    "DDP": (lambda n: f"module.{n}", "with the prefix `module.base_model.model.model.` where PEFT has"),
}


@pytest.mark.parametrize("name", RENAMED)
def test_names_of_other_writers_are_recognized_and_the_hint_renames_them(adapter, base, tmp_path, monkeypatch, name):
    new, cause = RENAMED[name]
    expected = load_file(adapter / WEIGHTS)
    rename(adapter, new)
    text = message(merge, base, adapter, tmp_path / "out")
    assert cause in text
    monkeypatch.chdir(adapter)
    exec(text.partition("does: `")[2].partition("` of")[0], vars(safetensors_torch))
    assert load_file(adapter / WEIGHTS).keys() == expected.keys()
    merge(base, adapter, tmp_path / "out")
    save_file(expected, adapter / WEIGHTS, {"format": "pt"})
    merge(base, adapter, tmp_path / "plain")
    assert verify(tmp_path / "out", tmp_path / "plain").same


def test_an_adapter_in_a_folder_of_its_name_is_pointed_at(adapter, base, tmp_path):
    (tmp_path / "named").mkdir()
    adapter.rename(tmp_path / "named" / "style")
    pointed = f"hint: give one of them: `{tmp_path / 'named'}/style`"
    assert pointed in message(merge, base, tmp_path / "named", tmp_path / "out")
    assert pointed in message(adapter_to_mcore, tmp_path / "named", tmp_path / "out", base=base)


def test_an_adapter_with_its_bases_config_is_an_adapter(adapter, base, tmp_path):
    shutil.copy(base / "config.json", adapter)
    assert message(hf_to_mcore, adapter, tmp_path / "m").startswith(f"`{adapter}` is an adapter without its model")
    adapter_to_mcore(adapter, tmp_path / "out", base=base)
    (adapter / CONFIG).unlink()
    assert message(hf_to_mcore, adapter, tmp_path / "m").startswith(f"`{adapter}` is an adapter without its model")


@pytest.mark.parametrize("module", ["lm_head"])
def test_an_adapter_of_the_head_is_sent_to_merge_which_takes_it(adapter, base, tmp_path, module):
    import torch

    weights = load_file(adapter / WEIGHTS)
    at = f"base_model.model.{module}"
    weights |= {f"{at}.lora_A.weight": torch.ones(4, 64), f"{at}.lora_B.weight": torch.ones(384, 4)}
    save_file(weights, adapter / WEIGHTS, {"format": "pt"})
    known = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**known, "target_modules": [*known["target_modules"], module]}))
    text = message(adapter_to_mcore, adapter, tmp_path / "out", base=base)
    assert (
        f"holds an adapter for `{module}.weight`, but Megatron's adapters are on the linear layers of the decoder alone" in text
    )
    assert "hint: merge it into its base model instead: `mbconvert merge`" in text
    merge(base, adapter, tmp_path / "out")
    assert not torch.equal(*(load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (base, tmp_path / "out")))


@pytest.mark.parametrize("file", ["adapters.safetensors", "adapter_0.pt", "pytorch_lora_weights.safetensors"])
def test_weights_in_another_file_are_named(adapter, base, tmp_path, file):
    (adapter / WEIGHTS).rename(adapter / file)
    text = message(merge, base, adapter, tmp_path / "out")
    assert f"`{adapter}` has no `{WEIGHTS}`, but `{file}`\n\nhint: another program wrote it" in text


@pytest.mark.parametrize(("fields", "way"), [
    ({"peft_type": "PREFIX_TUNING"}, "cannot be merged into its weights"), ({"peft_type": "IA3"}, "`merge_and_unload`"),
    ({"peft_type": None, "fine_tune_type": "lora", "lora_parameters": {}}, "`mlx_lm.fuse`"),
])  # fmt: skip
def test_other_kinds_of_adapters_have_their_way_out(adapter, base, tmp_path, fields, way):
    (adapter / CONFIG).write_text(json.dumps({**json.loads((adapter / CONFIG).read_text()), **fields}))
    text = message(merge, base, adapter, tmp_path / "out")
    assert f"`peft_type` in `{CONFIG}` is `{fields['peft_type']}`, which is not supported" in text
    assert way in text


def test_an_adapter_of_a_model_with_other_prefixes_says_so(adapter, base, tmp_path):
    rename(adapter, lambda name: name.replace("model.layers.", "layers."))
    text = message(merge, base, adapter, tmp_path / "out")
    assert "the base calls that weight `model.layers.0." in text
    assert '`n.replace("base_model.model.", "base_model.model.model.", 1)`' in text


def test_each_command_names_what_it_was_given_and_the_command_for_it(adapter, base, tmp_path):
    hf_to_mcore(base, tmp_path / "mcore")
    adapter_to_mcore(adapter, tmp_path / "lora", base=base)
    not_an_adapter = f"`{base}` is a Hugging Face model, not a Megatron adapter checkpoint\n\nhint: `mbconvert hf-to-mcore`"
    assert message(adapter_to_hf, base, tmp_path / "out").startswith(not_an_adapter)
    assert message(merge, base, base, tmp_path / "out").startswith(not_an_adapter)
    assert "`mbconvert merge BASE ADAPTER DST` takes the model first" in message(merge, base, base, tmp_path / "out")
    assert message(adapter_to_hf, adapter, tmp_path / "out").startswith(
        f"`{adapter}` is a PEFT adapter, not a Megatron adapter checkpoint\n\nhint: `mbconvert adapter-to-mcore` converts it"
    )
    assert message(adapter_to_mcore, tmp_path / "lora", tmp_path / "out", base=base).startswith(
        f"`{tmp_path / 'lora'}` is a Megatron checkpoint, not a PEFT adapter\n\nhint: `mbconvert mcore-to-hf` converts it, or"
    )
    alone = f"`{adapter}` is an adapter without its model"
    assert message(mcore_to_hf, adapter, tmp_path / "out").startswith(alone)
    assert message(merge, adapter, base, tmp_path / "out").startswith(alone)
    assert message(adapter_to_mcore, adapter, tmp_path / "out", base=adapter).startswith(alone)
