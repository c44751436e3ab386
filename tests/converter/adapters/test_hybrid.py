"""Adapters of a model in layout `hybrid`: modules are those of its layers, and PEFT's bytes come back."""

from __future__ import annotations

import json

import pytest

from converter import UserError, hf_to_mcore, inspect_checkpoint, merge_adapter, verify_checkpoints
from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
from tests.models import model_tree

ITERATION = "iter_0000000"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def hybrid(base, tmp_path):
    hf_to_mcore(base, tmp_path / "hybrid", layout="hybrid")
    return tmp_path / "hybrid"


@pytest.mark.parametrize("kind", [{}, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1]}], ids=str)
def test_an_adapter_for_a_hybrid_base_comes_back_with_the_same_bytes(peft_folder, hybrid, tmp_path, kind):
    folder = peft_folder(**kind)
    adapter_to_mcore(folder, tmp_path / "m", base=hybrid, verify=True)
    names = {row["name"] for row in inspect_checkpoint(tmp_path / "m", tensors=True).tensor_list}
    assert "decoder.layers.2.self_attention.linear_qkv.adapter.adapter_q.linear_in.weight" in names
    assert any(name.startswith("decoder.layers.1.mlp.linear_fc1.adapter.") for name in names) == (not kind)
    assert inspect_checkpoint(tmp_path / "m").layers_as == "hybrid"
    adapter_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("layout", ["gpt", "hybrid"])
def test_an_adapter_gets_the_layout_that_is_asked_for(peft_folder, base, hybrid, tmp_path, layout):
    folder, like = peft_folder(), {"gpt": base, "hybrid": hybrid}
    adapter_to_mcore(folder, tmp_path / "expected", base=like[layout])
    other = like["hybrid" if layout == "gpt" else "gpt"]
    adapter_to_mcore(folder, tmp_path / "m", base=other, layout=layout, verify=True)
    expected, made = (inspect_checkpoint(tmp_path / name, tensors=True) for name in ("expected", "m"))
    assert (made.layers_as, made.tensor_list) == (expected.layers_as, expected.tensor_list)
    adapter_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_merged_model_keeps_the_layout_of_its_base(peft_folder, base, hybrid, tmp_path):
    folder = peft_folder()
    adapter_to_mcore(folder, tmp_path / "m", base=hybrid)
    merge_adapter(hybrid, tmp_path / "m", tmp_path / "merged", tp=2)
    merge_adapter(hybrid, folder, tmp_path / "as gpt", layout="gpt")
    merge_adapter(base, tmp_path / "m", tmp_path / "hf")
    assert [inspect_checkpoint(tmp_path / name).layers_as for name in ("merged", "as gpt", "hf")] == ["hybrid", "gpt", ""]
    assert verify_checkpoints(tmp_path / "merged", tmp_path / "as gpt").same
    assert verify_checkpoints(tmp_path / "merged", tmp_path / "hf").same
    assert model_tree(tmp_path / "hf") != model_tree(base)


def test_an_adapter_of_an_unknown_layout_is_refused(peft_folder, hybrid, tmp_path):
    adapter_to_mcore(peft_folder(), tmp_path / "m", base=hybrid)
    file = tmp_path / "m" / ITERATION / "adapter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layout": "mamba"}))
    with pytest.raises(UserError, match=r"`layout` in `adapter\.json` is `mamba`, which should be `gpt` or `hybrid`"):
        adapter_to_hf(tmp_path / "m", tmp_path / "back")
