"""Every command refuses an adapter without all tensors that its configuration requests."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from converter import UserError, hf_to_mcore
from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
from converter.adapters.merge import merge

FILE = "adapter_model.safetensors"


def lacking(whole, folder, *parts, **changes):
    """A copy without the tensors in whose names all of `parts` are."""
    shutil.copytree(whole, folder)
    kept = {name: tensor for name, tensor in load_file(folder / FILE).items() if not all(part in name for part in parts)}
    save_file(kept, folder / FILE, {"format": "pt"})
    edit(folder / "adapter_config.json", **changes)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CASES = {
    "a layer": (["layers.3."], {}, "model.layers.3.mlp.down_proj.weight"),
    "a module": (["up_proj"], {}, "model.layers.0.mlp.up_proj.weight"),
    "a module of one layer": (["layers.2.", "o_proj"], {}, "model.layers.2.self_attn.o_proj.weight"),
    "of all linear layers": (["layers.1.", "v_proj"], {"target_modules": "all-linear"}, "model.layers.1.self_attn.v_proj.weight"),
    "by a pattern": (["layers.1.", "k_proj"], {"target_modules": r".*\.(self_attn|mlp)\..*_proj"},
                     "model.layers.1.self_attn.k_proj.weight"),
    "the output layer": (["nothing"], {"target_modules": ["q_proj", "lm_head"]}, "lm_head.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["llama", "unknown"])
def test_a_merge_of_a_part_is_refused_with_what_is_missing(base, peft_folder, tmp_path, name, family):
    parts, changes, weight = CASES[name]
    if name == "the output layer":
        whole, parts = peft_folder(target_modules=["q_proj"]), ["nothing", "nowhere"]
    else:
        whole = peft_folder()
    adapter = lacking(whole, tmp_path / "adapter", *parts, **changes)
    if family == "unknown":
        shutil.copytree(base, tmp_path / "base")
        edit(tmp_path / "base" / "config.json", model_type="other")
        base = tmp_path / "base"
    with pytest.raises(UserError) as error:
        merge(base, adapter, tmp_path / "merged", to="hf")
    text = str(error.value)
    assert text.startswith(f"the adapter `{adapter}` requests changes of `{weight}`")
    assert text.endswith(
        ", but its file holds no tensors for them\n\n"
        "hint: its file is incomplete, or it was trained on another base model: only a part of it could be merged"
    )
    assert not list(tmp_path.glob("merged*"))


def test_the_same_beside_a_base_in_megatrons_format(base, peft_folder, tmp_path):
    hf_to_mcore(base, tmp_path / "base")
    adapter = lacking(peft_folder(), tmp_path / "adapter", "layers.3.")
    with pytest.raises(UserError, match=r"requests changes of `model.layers.3.mlp.down_proj.weight`.* and 4 more"):
        merge(tmp_path / "base", adapter, tmp_path / "merged")


@pytest.mark.parametrize("changes", [
    {"target_modules": "all-linear"}, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
     "down_proj", "query_key_value"]},
], ids=str)  # fmt: skip
def test_a_whole_adapter_is_merged(base, peft_folder, tmp_path, changes):
    """The output layer is none of PEFT's `all-linear`, and a target that no module has requests nothing."""
    merge(base, lacking(peft_folder(), tmp_path / "adapter", "nothing", **changes), tmp_path / "merged", dry_run=True)


@pytest.mark.parametrize("canonical", [True, False])
def test_a_checkpoint_that_lacks_a_targets_adapter_is_refused(base, peft_folder, tmp_path, canonical):
    attention = peft_folder(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], equal_a=True)
    adapter_to_mcore(attention, tmp_path / "m", base=base, canonical=canonical)
    path = tmp_path / "m" / "iter_0000000" / "adapter.json"
    asked = json.loads(path.read_text())["target_modules"]
    adapter_to_hf(tmp_path / "m", tmp_path / "whole")
    edit(path, target_modules=[*asked, "*.layers.2.*.linear_fc2"])
    for act in (adapter_to_hf, lambda source, target: merge(base, source, target)):
        with pytest.raises(UserError) as error:
            act(tmp_path / "m", tmp_path / "out")
        assert str(error.value) == (
            "the checkpoint lacks `decoder.layers.2.mlp.linear_fc2.adapter.linear_in.weight`, which `target_modules` in "
            "`adapter.json` requests\n\nhint: the checkpoint is incomplete, or that file is of another adapter"
        )
    edit(path, target_modules=[*asked, "linear_fc2"], exclude_modules=["linear_fc2"])
    adapter_to_hf(tmp_path / "m", tmp_path / "excluded")
