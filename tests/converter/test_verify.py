"""Same and different, across formats, layouts, writers and shards; and what `--verify` sees of a disk that lies."""

from __future__ import annotations

import json
import mmap
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import UserError, hf_to_mcore, mcore_to_hf, verify
from tests.converter.test_cli import mbconvert
from tests.models import VARIANTS, tree


def edit(folder, change):
    """Change the tensors of a directory of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def pair(model_folder, tmp_path):
    """A model, and a copy of it to change."""
    source = model_folder("gqa", dtype="bfloat16")
    shutil.copytree(source, tmp_path / "copy")
    return source, tmp_path / "copy"


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_import_and_its_export_are_the_source(model_folder, tmp_path, variant):
    source = model_folder(variant, dtype="bfloat16")
    hf_to_mcore(source, tmp_path / "m", tp=1 if variant == "mqa" else 2, pp=2)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", max_shard_size=60_000)
    for first, second in ((source, "m"), ("m", source), ("back", "m"), (source, "back"), ("m", "m")):
        comparison = verify(tmp_path / first, tmp_path / second)
        assert comparison.same, comparison.lines()
        assert comparison.tensors == len(load_file(source / "model.safetensors"))


@pytest.mark.parametrize("layout", [{"tp": 4}, {"pp": 4}, {"tp": 2, "pp": 2, "vpp": 2}, {"pp": 2, "pp_layout": [3, 1]}], ids=str)
def test_megatron_at_another_layout_is_the_same(model_folder, checkpoint, tmp_path, layout):
    hf_to_mcore(model_folder("gqa", dtype="bfloat16"), tmp_path / "other", make_vocab_size_divisible_by=500, **layout)
    assert verify(checkpoint, tmp_path / "other").same


def test_a_checkpoint_that_says_nothing_of_its_model_is_compared_as_the_others(model_folder, checkpoint, tmp_path):
    shutil.rmtree(checkpoint / "iter_0000000" / "huggingface")
    (checkpoint / "iter_0000000" / "run_config.yaml").unlink()
    source = model_folder("gqa", dtype="bfloat16")
    assert verify(source, checkpoint).tensors == 39
    assert verify(source, checkpoint).same
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert verify(checkpoint, tmp_path / "copy").tensors == 27
    assert verify(checkpoint, tmp_path / "copy").same


def test_a_difference_is_named_counted_placed_and_measured(pair):
    def change(tensors):
        weight = tensors["model.layers.2.self_attn.k_proj.weight"]
        weight[3, 5] = 7.0
        weight[30, 1] = -100.0

    source, copy = pair
    before = load_file(source / "model.safetensors")["model.layers.2.self_attn.k_proj.weight"]
    edit(copy, change)
    comparison = verify(source, copy)
    [difference] = comparison.different
    assert difference.name == "model.layers.2.self_attn.k_proj.weight"
    assert (difference.elements, difference.first) == (2, (3, 5))
    assert difference.values == (before[3, 5].item(), 7.0)
    assert difference.largest == before[30, 1].item() + 100.0
    hf_to_mcore(copy, copy.with_name("m"), tp=2, pp=2)
    assert verify(source, copy.with_name("m")).different == [difference]
    assert not verify(copy, copy.with_name("m")).different


def test_bits_are_compared_not_values(pair):
    def minus_zero(tensors):
        tensors["model.norm.weight"][0] = -0.0

    def plus_zero(tensors):
        tensors["model.norm.weight"][0] = 0.0

    source, copy = pair
    shutil.copytree(source, copy.with_name("zero"))
    edit(copy, minus_zero)
    edit(copy.with_name("zero"), plus_zero)
    [difference] = verify(copy, copy.with_name("zero")).different
    assert (difference.elements, difference.largest) == (1, 0.0)


def test_the_same_nan_is_the_same_and_another_is_not(pair):
    source, copy = pair
    shutil.copytree(source, copy.with_name("nan"))

    def nan(payload):
        return lambda tensors: tensors["model.norm.weight"].view(torch.int16).__setitem__(0, payload)

    edit(copy, nan(0x7FC0))
    edit(copy.with_name("nan"), nan(0x7FC1))
    assert verify(copy, copy).same
    [difference] = verify(copy, copy.with_name("nan")).different
    assert difference.elements == 1
    assert np.isnan(difference.values).all()
    assert difference.largest is None
    assert str(difference) == "`model.norm.weight`: 1 element differs at [0]: nan and nan, no two of them numbers"


def _no_number(text):
    raise AssertionError(f"{text} is not JSON")


def test_json_of_a_comparison_is_json_where_values_are_no_numbers(pair):
    source, copy = pair
    edit(copy, lambda tensors: tensors["model.norm.weight"].__setitem__(slice(0, 2), torch.tensor([torch.nan, torch.inf])))
    done = mbconvert("verify", source, copy, "--json")
    [difference] = json.loads(done.stdout, parse_constant=_no_number)["different"]
    assert (difference["values"][1], difference["largest"]) == ("NaN", "Infinity")


def test_tensors_on_one_side_only_are_named(pair):
    source, copy = pair
    edit(copy, lambda tensors: tensors.pop("model.norm.weight") is None or tensors.update(extra=torch.ones(2)))
    comparison = verify(source, copy)
    assert (comparison.only_in_one, comparison.only_in_other, comparison.same) == (["model.norm.weight"], ["extra"], False)


def test_another_dtype_is_different_and_the_same_after_a_cast(model_folder, tmp_path):
    source = model_folder("gqa", dtype="float32")
    hf_to_mcore(source, tmp_path / "m", tp=2, dtype="bf16")
    comparison = verify(source, tmp_path / "m")
    assert len(comparison.different) == comparison.tensors
    assert "fp32 and bf16: `--cast-to bf16` compares after a cast" in str(comparison.different[0])
    assert verify(source, tmp_path / "m", cast_to="bf16").same
    assert not verify(source, tmp_path / "m", cast_to="fp32").same


def test_another_shape_is_different(pair):
    source, copy = pair
    edit(copy, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][:-1].clone()}))
    assert "shape [64] and [63]" in str(verify(source, copy).different[0])


def test_an_output_layer_that_repeats_the_embedding_is_the_same_model(model_folder, tmp_path):
    source = model_folder("tied", dtype="bfloat16")
    shutil.copytree(source, tmp_path / "twice")
    edit(tmp_path / "twice", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    hf_to_mcore(source, tmp_path / "m")
    for first, second in ((source, "twice"), ("twice", source), ("m", "twice"), ("twice", "m")):
        assert verify(tmp_path / first, tmp_path / second).same
    edit(tmp_path / "twice", lambda t: t["lm_head.weight"].__setitem__((0, 0), 9.0))
    assert not verify(source, tmp_path / "twice").same


def test_exit_codes_and_output(pair, tmp_path):
    source, copy = pair
    done = mbconvert("verify", source, copy)
    assert (done.returncode, done.stdout) == (0, "same: 39 tensors, 172.61 k parameters compared bit for bit\n")
    edit(copy, lambda tensors: tensors["model.norm.weight"].__setitem__(7, 5.0))
    done = mbconvert("verify", source, copy)
    assert done.returncode == 1
    assert done.stdout.startswith("`model.norm.weight`: 1 element differs at [7]: ")
    assert done.stdout.splitlines()[1].startswith("DIFFERENT: 39 tensors")
    report = json.loads(mbconvert("verify", source, copy, "--json").stdout)
    assert (report["same"], report["different"][0]["name"]) == (False, "model.norm.weight")
    assert mbconvert("verify", source, tmp_path / "nowhere").returncode == 1
    assert mbconvert("verify", source).returncode == 2


class Lying:
    """A disk that keeps something else than it was given: one bit of the `nth` long write is flipped."""

    def __init__(self, monkeypatch, nth):
        self._left, self._pwrite = nth, os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, descriptor, data, offset):
        self._left -= len(data) > 4000
        if self._left == 0 and len(data) > 4000:
            changed = mmap.mmap(-1, len(data))  # starts at a page, as direct I/O wants it
            changed[:] = bytes(data)
            changed[1234] ^= 4
            data = changed
        return self._pwrite(descriptor, data, offset)


@pytest.mark.parametrize("nth", [1, 4, 9])
def test_verify_sees_what_a_lying_disk_holds_and_leaves_no_target(model_folder, tmp_path, monkeypatch, nth):
    source = model_folder("gqa", dtype="bfloat16")
    with monkeypatch.context() as patch:
        Lying(patch, nth)
        with pytest.raises(UserError, match=r"what is on the disk is not what was converted: `model\..* 1 element differs"):
            hf_to_mcore(source, tmp_path / "m", tp=2, pp=2, verify=True)
    assert not list(tmp_path.iterdir())
    hf_to_mcore(source, tmp_path / "m", tp=2, pp=2, verify=True)
    with monkeypatch.context() as patch:
        Lying(patch, nth)
        with pytest.raises(UserError, match="what is on the disk is not what was converted"):
            mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_verify_changes_no_byte(model_folder, tmp_path):
    source = model_folder("padded_vocab", dtype="float32")
    for name, options in (("plain", {}), ("verified", {"verify": True})):
        (tmp_path / name).mkdir()
        hf_to_mcore(source, tmp_path / name / "m", tp=2, dtype="bf16", **options)
        mcore_to_hf(tmp_path / name / "m", tmp_path / name / "back", **options)
    assert tree(tmp_path / "plain") == tree(tmp_path / "verified")


def test_numbers_without_dimensions_are_compared_as_one_row(tmp_path):
    import torch.distributed.checkpoint as dcp

    for name, scale in (("one", 1.0), ("other", 2.0)):
        state = {"decoder.weight": torch.ones(8), "decoder.scale": torch.tensor(scale)}
        dcp.save(state, checkpoint_id=tmp_path / name, no_dist=True)
    comparison = verify(tmp_path / "one", tmp_path / "other")
    assert [(difference.name, difference.elements, difference.values) for difference in comparison.different] == [
        ("decoder.scale", 1, (1.0, 2.0))
    ]
    assert verify(tmp_path / "one", tmp_path / "one").same


def test_a_number_without_dimensions_is_not_the_same_as_a_row_of_one(tmp_path):
    for name, value in (("a", torch.tensor(1.0)), ("b", torch.tensor([1.0])), ("c", torch.tensor(1.0, dtype=torch.bfloat16))):
        (tmp_path / name).mkdir()
        save_file({"scale": value}, tmp_path / name / "model.safetensors")
    assert verify(tmp_path / "a", tmp_path / "a").same
    assert verify(tmp_path / "a", tmp_path / "b").lines() == ["`scale`: shape [] and [1]"]
    assert verify(tmp_path / "a", tmp_path / "c", cast_to="bf16").same


def test_a_damaged_config_is_an_error_not_a_reason_to_take_the_others(model_folder, checkpoint):
    (checkpoint / "iter_0000000" / "huggingface" / "files" / "config.json").write_text("{broken")
    with pytest.raises(UserError, match=r"`config\.json` is not readable JSON"):
        verify(model_folder("gqa", dtype="bfloat16"), checkpoint)


def test_what_should_be_zero_and_is_not_is_named_once_with_its_side(model_folder, checkpoint, tmp_path):
    source = model_folder("attention_bias", dtype="bfloat16")
    hf_to_mcore(source, tmp_path / "m")
    comparison = verify(tmp_path / "m", tmp_path / "m")
    assert comparison.same
    weights = tmp_path / "m" / "iter_0000000" / "__0_0.distcp"
    from formats.dcp import DcpContainer
    from formats.folder import LocalFolder
    from formats.spec import extent

    container = DcpContainer(LocalFolder(weights.parent))
    bias = container.tensor("decoder.layers.mlp.linear_fc1.bias")
    stored = container._locate(bias, 0, extent(bias.region(0)))
    with weights.open("r+b") as file:
        file.seek(stored.offset)
        file.write(b"\x01\x02")
    comparison = verify(source, tmp_path / "m")
    assert [difference.name for difference in comparison.different] == ["decoder.layers.0.mlp.linear_fc1.bias"]
    assert "is not zero in `" in str(comparison.different[0])
