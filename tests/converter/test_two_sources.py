"""Where a Hugging Face directory says a thing twice, the two must agree, or what transformers takes is taken."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from converter import Reporter, UserError, hf_to_mcore, mcore_to_hf
from converter.config_rope import rope_numbers
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.shard_files import shard_names
from tests.models import LLAMA31_ROPE
from tests.refusal import refused

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def notes_of(action, *arguments, **options):
    notes = []
    action(*arguments, reporter=Reporter(note=notes.append), **options)
    return notes


@pytest.fixture
def source(model_folder, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(model_folder("gqa"), folder)
    return folder


def add_old_shards(source, *, index=True):
    """Those of a model that lay there before, with other numbers."""
    old = {name: tensor + 1 for name, tensor in load_file(source / "model.safetensors").items()}
    names = sorted(old)
    held = {SHARDS[0]: names[:9], SHARDS[1]: names[9:]}
    for file, some in held.items():
        save_file({name: old[name] for name in some}, source / file, {"format": "pt"})
    if index:
        weight_map = {name: file for file, some in held.items() for name in some}
        (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_an_index_of_other_files_beside_a_whole_one_is_refused(source, tmp_path):
    add_old_shards(source)
    with pytest.raises(UserError) as error:
        hf_to_mcore(source, tmp_path / "out")
    assert str(error.value) == (
        f"`{source}` holds two models: `model.safetensors`, and the one of `{INDEX}` in `{SHARDS[0]}` and 1 more\n\n"
        "hint: transformers reads `model.safetensors` and ignores the index: remove the outdated one"
    )
    (source / SHARDS[1]).unlink()
    refused(hf_to_mcore, source, tmp_path, f"holds two models: .* in `{SHARDS[0]}`\n")


@pytest.mark.parametrize("left", [(), ("index",), ("shards",), ("index", "shards")], ids=str)
def test_the_file_that_transformers_loads_is_read_or_none(source, left):
    if left:
        add_old_shards(source, index="index" in left)
    for file in SHARDS if "shards" not in left else ():
        (source / file).unlink(missing_ok=True)
    theirs = AutoModelForCausalLM.from_pretrained(source).state_dict()["model.norm.weight"]
    if left == ("index", "shards"):
        with pytest.raises(UserError, match="holds two models"):
            shard_names(LocalFolder(source))
        return
    assert shard_names(LocalFolder(source)) == ["model.safetensors"]
    assert torch.equal(theirs, load_file(source / "model.safetensors")["model.norm.weight"])
    HuggingFaceReader(LocalFolder(source)).close()


def test_an_index_whose_files_are_gone_stays_behind_and_is_named(source, tmp_path):
    add_old_shards(source)
    for file in SHARDS:
        (source / file).unlink()
    notes = notes_of(hf_to_mcore, source, tmp_path / "m")
    assert f"left out, not part of the model: {INDEX}" in notes
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert not (tmp_path / "back" / INDEX).exists()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_an_index_of_a_variant_does_not_travel_without_its_files(source, tmp_path):
    (source / "model.safetensors.index.fp16.json").write_text("{}")
    assert "left out, not part of the model: model.safetensors.index.fp16.json" in notes_of(hf_to_mcore, source, tmp_path / "m")


def test_a_config_that_names_another_file_of_weights_is_refused(source, tmp_path):
    edit_config(source, transformers_weights="other.safetensors")
    with pytest.raises(UserError) as error:
        hf_to_mcore(source, tmp_path / "out")
    assert str(error.value) == (
        "`transformers_weights` in `config.json` is `other.safetensors`, but the weights here are in `model.safetensors`\n\n"
        "hint: transformers would load that file: remove the field, or the other files"
    )
    edit_config(source, transformers_weights="model.safetensors")
    hf_to_mcore(source, tmp_path / "out", dry_run=True)


LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {name: value for name, value in LLAMA31_ROPE.items() if name != "rope_theta"}
ROPES = {
    "none": {"rope_parameters": ...},
    "the old fields": {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": LLAMA3},
    "the old name of the type": {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "the new one": {"rope_parameters": LLAMA31_ROPE},
    "both alike": {"rope_parameters": LLAMA31_ROPE, "rope_scaling": LLAMA3, "rope_theta": 5e5},
    "both with a base": {"rope_parameters": LLAMA31_ROPE, "rope_scaling": LLAMA31_ROPE},
    "an empty old one": {"rope_parameters": {**LINEAR, "rope_theta": 5e5}, "rope_scaling": None},
    "no length before": {"rope_parameters": {k: v for k, v in LLAMA31_ROPE.items() if not k.startswith("original")}},
    "default and llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": LLAMA3},
    "default and linear": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": LINEAR},
    "two factors": {"rope_parameters": {**LINEAR, "rope_theta": 1e4}, "rope_scaling": {**LINEAR, "factor": 4.0}},
    "two bases": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4},
    "a base that is lost": {"rope_parameters": LLAMA31_ROPE, "rope_scaling": LLAMA3},
    "two types": {"rope_parameters": ..., "rope_theta": 1e4, "rope_scaling": {**LINEAR, "type": "dynamic"}},
    "two lengths before": {"rope_parameters": LLAMA31_ROPE, "original_max_position_embeddings": 64},
    "a part of each head": {"rope_parameters": {**LINEAR, "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}  # fmt: skip
AGREE = list(ROPES)[:8]


@pytest.mark.parametrize("name", ROPES)
def test_rope_is_what_transformers_computes_or_refused_with_both_fields(source, tmp_path, name):
    edit_config(source, **ROPES[name])
    config = json.loads((source / "config.json").read_text())
    theirs = AutoConfig.from_pretrained(source).rope_parameters
    if name in AGREE:
        ours = rope_numbers(config)
        assert {key: ours.get(key) for key in theirs if key != "type"} == {k: v for k, v in theirs.items() if k != "type"}
    else:
        refused(hf_to_mcore, source, tmp_path, r"(?s)`rope_parameters`.*`rope_scaling`|says two things|partial_rotary_factor")


def test_two_ropes_are_refused_by_both_names_and_values(source, tmp_path):
    edit_config(source, **ROPES["default and linear"])
    with pytest.raises(UserError) as error:
        hf_to_mcore(source, tmp_path / "out")
    assert str(error.value) == (
        "`config.json` has `rope_parameters`, by which `rope_type` is `default`, and `rope_scaling`, by which it is `linear`\n\n"
        "hint: the first is of transformers 5, the second, with `rope_theta` beside it, of 4: leave one out"
    )
    edit_config(source, **{**ROPES["two bases"], "rope_scaling": ...})
    with pytest.raises(UserError) as error:
        hf_to_mcore(source, tmp_path / "out")
    assert str(error.value) == (
        "`config.json` says two things: `rope_theta` in `rope_parameters` is `500000.0`, `rope_theta` is `10000.0`\n\n"
        "hint: loaders differ in which they take: leave one out"
    )


@pytest.mark.parametrize(("family", "changes", "pattern"), [
    ("mistral", {"sliding_window": 64, "use_sliding_window": False},
     r"says two things: `use_sliding_window` is `False`, `sliding_window` is `64`\n\nhint: .* set it to null"),
    ("mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 4}, "`layer_types` has `sliding_attention`"),
    ("mistral", {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2},
     "`layer_types` has `full_attention`"),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "`layer_types` has `sliding_attention`"),
    ("llama", {"layer_types": ["full_attention"] * 4,
               "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
     "has parameters of their own for `full_attention` layers"),
])  # fmt: skip
def test_layers_that_differ_from_the_rest_of_the_config_are_refused(source, tmp_path, family, changes, pattern):
    edit_config(source, model_type=family, **changes)
    refused(hf_to_mcore, source, tmp_path, pattern)


@pytest.mark.parametrize("changes", [
    {"sliding_window": 64, "use_sliding_window": True}, {"sliding_window": None, "use_sliding_window": False},
    {"sliding_window": 64, "layer_types": ["sliding_attention"] * 4},
    {"sliding_window": None, "layer_types": ["full_attention"] * 4},
], ids=str)  # fmt: skip
def test_doubled_fields_that_agree_pass(source, tmp_path, changes):
    edit_config(source, model_type="mistral", **changes)
    hf_to_mcore(source, tmp_path / "m", dry_run=True)


def test_both_names_of_the_dtype_follow_a_cast(source, tmp_path):
    edit_config(source, dtype="float32", torch_dtype="float32")
    hf_to_mcore(source, tmp_path / "m", dtype="bf16")
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def add_adapter(folder, *, file="adapter_model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 1)}, folder / file)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_model_is_refused(source, tmp_path, file):
    add_adapter(source, file=file)
    with pytest.raises(UserError) as error:
        hf_to_mcore(source, tmp_path / "out")
    assert str(error.value) == (
        f"`{source}` holds a model and an adapter beside it, `adapter_config.json`: transformers would load both\n\n"
        "hint: `mbconvert merge DIR DIR DST`, with this folder as both, puts the adapter into the model; for the model alone "
        "move the files `adapter_*` elsewhere"
    )


def test_an_adapter_in_a_folder_of_its_own_stays_behind_whole(source, tmp_path):
    add_adapter(source / "checkpoint-100")
    (source / "checkpoint-100" / "trainer_state.json").write_text("{}")
    notes = notes_of(hf_to_mcore, source, tmp_path / "m")
    named = "checkpoint-100/adapter_config.json, checkpoint-100/adapter_model.safetensors"
    assert f"left out, not part of the model: {named}" in notes
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert [path.name for path in (tmp_path / "back" / "checkpoint-100").iterdir()] == ["trainer_state.json"]


@pytest.mark.parametrize("name", ["tokenizer.json", "assets/more.json"])
def test_a_link_to_no_file_is_refused_where_the_file_would_travel(source, tmp_path, name):
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to("../../blobs/0123")
    with pytest.raises(UserError) as error:
        hf_to_mcore(source, tmp_path / "out")
    assert str(error.value) == (
        f"`{name}` in `{source}` is a broken link\n\nhint: fetch the file again, or remove the link if the model does not need it"
    )
    assert not list(tmp_path.glob("out*"))
    (source / name).unlink()
    (source / "pytorch_model.bin").symlink_to("../../blobs/0123")
    assert "left out, not part of the model: pytorch_model.bin" in notes_of(hf_to_mcore, source, tmp_path / "out")


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_a_quantization_that_the_weights_do_not_have_is_told_of_and_taken_out(source, tmp_path, field):
    edit_config(source, **{field: {"quant_method": "fp8"}})
    message = f"`config.json` has `{field}`, but no weight is quantized: an export leaves it out"
    assert message in notes_of(hf_to_mcore, source, tmp_path / "m")
    expected = {name: value for name, value in json.loads((source / "config.json").read_text()).items() if name != field}
    notes = notes_of(mcore_to_hf, tmp_path / "m", tmp_path / "back")
    assert notes == [f"`config.json` changed: without `{field}`, for the weights are not quantized"]
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == expected


def test_a_quantization_of_quantized_weights_stays(source, tmp_path):
    path = source / "model.safetensors"
    weights = load_file(path)
    save_file({n: t.to(torch.float8_e4m3fn) if "proj" in n else t for n, t in weights.items()}, path, {"format": "pt"})
    edit_config(source, quantization_config={"quant_method": "fbgemm_fp8"})
    assert notes_of(hf_to_mcore, source, tmp_path / "m") == []
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
