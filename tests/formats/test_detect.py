"""What a folder is, is told by what is in it; what is not converted here is named, with a way out."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import save_file

from formats.content import recognize
from formats.dcp_index import read_index
from formats.detect import Format, detect, open_checkpoint, open_megatron, refuse_file
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.shard_files import shard_names

WEIGHTS = {"w": np.ones((2, 3), "float32")}


def folder_with(path, *names):
    """A folder with these files, and folders where names end in a slash."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).mkdir(exist_ok=True) if name.endswith("/") else (path / name).write_bytes(b"PK")
    return LocalFolder(path)


def message(folder):
    with pytest.raises(UserError) as error:
        detect(folder)
    return str(error.value)


@pytest.mark.parametrize("name", ["iter_0000100", "release", "global_step1", "model"])
def test_a_folder_is_a_model_by_its_content_and_not_by_its_name(tmp_path, name):
    (tmp_path / name).mkdir()
    save_file(WEIGHTS, tmp_path / name / "model.safetensors")
    assert detect(LocalFolder(tmp_path / name)) is Format.HUGGINGFACE


@pytest.mark.parametrize(("names", "expected"), [
    (["model.safetensors.index.json"], Format.HUGGINGFACE),
    (["model-00001-of-00002.safetensors", "pytorch_model.bin", "optimizer.pt", "global_step5/"], Format.HUGGINGFACE),
    (["adapter_model.safetensors"], Format.PEFT),
    (["adapter_config.json", "adapter_model.safetensors", "config.json", "README.md"], Format.PEFT),
    (["adapter_model.bin"], Format.PEFT),
    (["adapter_config.json", "model.safetensors"], Format.HUGGINGFACE),
    (["latest_checkpointed_iteration.txt"], Format.TORCH_DIST),
    ([".metadata", "metadata.json"], Format.TORCH_DIST),
    ([".metadata", "common.pt"], Format.TORCH_DIST),
    (["mp_rank_00_001/model_optim_rng.pt"], Format.RANK_FILES),
    (["weights/.metadata", "context/model.yaml"], Format.NEMO),
    (["model_weights/.metadata", "model_config.yaml"], Format.NEMO),
    (["model_weights.ckpt", "model_config.yaml"], Format.NEMO),
    (["tp_rank_00_pp_rank_000/model_weights.ckpt", "model_config.yaml"], Format.NEMO),
    (["shard-00001-model-00001-of-00002.safetensors"], Format.SLICES),
    (["shard-00001-model-00001-of-00001.safetensors", "model.safetensors"], Format.HUGGINGFACE),
])  # fmt: skip
def test_formats_that_are_read(tmp_path, names, expected):
    assert detect(folder_with(tmp_path / "m", *names)) is expected


def test_a_checkpoint_is_opened_by_its_content(tmp_path):
    (tmp_path / "hf").mkdir()
    save_file(WEIGHTS, tmp_path / "hf" / "model.safetensors")
    iteration = tmp_path / "megatron" / "iter_0000007"
    tensors = {"decoder.layers.mlp.weight": torch.zeros(2, 3), "optimizer.state.exp_avg.w": torch.zeros(1)}
    dcp.save(tensors, checkpoint_id=iteration)
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("7")
    huggingface = open_checkpoint(LocalFolder(tmp_path / "hf"))
    megatron = open_megatron(LocalFolder(tmp_path / "megatron"))
    assert list(huggingface.specs) == ["w"]
    assert type(open_checkpoint(LocalFolder(tmp_path / "megatron"))) is type(megatron)
    assert list(megatron.specs) == ["decoder.layers.0.mlp.weight", "decoder.layers.1.mlp.weight"]
    assert (megatron.folder.name, set(megatron.files)) == ("iter_0000007", {"__0_0.distcp"})
    assert (megatron.has_optimizer, list(megatron.others)) == (True, ["optimizer.state.exp_avg.w"])


OTHERS = {
    "pytorch": (["config.json", "pytorch_model.bin"], "`pytorch_model.bin`: pickled PyTorch tensors", "save_pretrained"),
    "pytorch shards": (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "pickled", "save_pretrained"),
    "variant": (["pytorch_model.fp16.bin"], "pickled PyTorch tensors", "AutoModelForCausalLM"),
    "Meta": (["consolidated.00.pth", "params.json", "tokenizer.model"], "Meta's own format", "convert_llama_weights_to_hf.py"),
    "GGUF": (["llama.Q4_K_M.gguf", "config.json"], "`llama.Q4_K_M.gguf`: GGUF", 'gguf_file="llama.Q4_K_M.gguf"'),
    "verl": (["model_world_size_2_rank_0.pt", "fsdp_config.json"], "verl", "verl.model_merger merge"),
    "DeepSpeed": (["latest", "zero_to_fp32.py", "global_step1/mp_rank_00_model_states.pt"], "DeepSpeed", "zero_to_fp32.py"),
    "DeepSpeed's step": (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed", "zero_to"),
    "ZeRO in bf16": (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "ZeRO stage 1 or 2", "zero_to_fp32"),
    "ZeRO 3": (["zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], "ZeRO stage 3", ""),
    "universal": (["zero/lm_head.weight/fp32.pt", "mp_rank_00_model_states.pt"], "a universal checkpoint", "load_universal"),
    "universal's root": (["latest_universal", "global_step1_universal/zero/w/fp32.pt"], "a universal checkpoint", "zero_to_fp32"),
    "one rank": (["model_optim_rng.pt", "distrib_optim.pt"], "the state of one rank", "checkpoint's root"),
    "ranks": (["rank_0.pt", "rank_1.pt"], "one file for each rank", "save_pretrained"),
    "NeMo": (["llama.nemo"], "a NeMo archive", "give the archive itself: `"),
    "TensorFlow": (["tf_model.h5"], "TensorFlow weights", "from_tf=True"),
    "Flax": (["flax_model.msgpack"], "Flax or JAX weights", "from_flax=True"),
    "ONNX": (["model.onnx", "model.onnx_data"], "an ONNX graph", "original weights"),
    "ONNX without its graph": (["model.onnx_data_1"], "an ONNX graph", "original weights"),
    "CoreML": (["llama.mlpackage/Manifest.json"], "a CoreML model", "original weights"),
    "MLX": (["weights.npz"], "numpy arrays", "original weights"),
    "Rust": (["rust_model.ot"], "weights for Rust", "original weights"),
    "torch.save": (["config.json", "model.pth", "training_args.bin"], "`model.pth`: pickled PyTorch tensors", "save_pretrained"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_format_is_named_with_the_way_out(tmp_path, name):
    names, what, way = OTHERS[name]
    text = message(folder_with(tmp_path / "my model", *names))
    problem, _, hint = text.partition("\n\nhint: ")
    assert str(tmp_path / "my model") in problem
    assert what in problem
    assert way in hint
    assert "{" not in hint


def test_the_stage_of_deepspeed_is_told_by_the_latest_step(tmp_path):
    file = "zero_pp_rank_0_mp_rank_00_model_states.pt"
    folder = folder_with(tmp_path / "m", "latest", "zero_to_fp32.py", f"global_step5/{file}")
    (tmp_path / "m" / "latest").write_text("global_step5")
    assert f"has its weights in `global_step5/{file}`: a DeepSpeed checkpoint of ZeRO stage 3" in message(folder)
    (tmp_path / "m" / "latest").write_text("../m/global_step5")
    assert "`global_step5/`: a DeepSpeed checkpoint\n" in message(folder)


def test_zarr_is_complete_when_its_last_file_is_there(tmp_path):
    folder = folder_with(tmp_path / "m", "model.decoder.layers.mlp/.zarray", "model.decoder.layers.mlp/0.0")
    assert "is an incomplete checkpoint: `metadata.json` is missing" in message(folder)
    (tmp_path / "m" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert detect(folder) is Format.ZARR


def test_another_backend_is_named(tmp_path):
    folder = folder_with(tmp_path / "m", "metadata.json")
    (tmp_path / "m" / "metadata.json").write_text('{"sharded_backend": "zarr3"}')
    assert "is in the `zarr3` format, which is not supported yet" in message(folder)


@pytest.mark.parametrize("names", [
    ["config.json", "model.safetensors.incomplete"], ["model-00001-of-00004.safetensors.aria2"], ["model.safetensors.part"],
    ["config.json", "model.safetensors.crdownload"], ["config.json", ".cache/huggingface/download/abc.def.incomplete"],
])  # fmt: skip
def test_an_unfinished_download_is_said_to_be_one(tmp_path, names):
    text = message(folder_with(tmp_path / "m", *names))
    assert f"`{tmp_path / 'm'}` is an unfinished download: it has `{names[-1]}` and no weights" in text


@pytest.mark.parametrize("ending", ["aria2", "part", "crdownload"])
def test_a_file_that_a_download_still_writes_to_is_refused_though_it_has_its_size(tmp_path, ending):
    (tmp_path / f"model.safetensors.{ending}").write_bytes(b"x")
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"`model.safetensors` is incomplete: `model.safetensors.{ending}` beside it"):
        HuggingFaceReader(LocalFolder(tmp_path))


def test_an_empty_folder_and_one_without_weights(tmp_path):
    (tmp_path / "m").mkdir()
    assert message(LocalFolder(tmp_path / "m")).startswith(f"`{tmp_path / 'm'}` is empty")
    text = message(folder_with(tmp_path / "m", "config.json", "README.md"))
    assert "holds no weights: it is neither a Hugging Face directory nor a Megatron checkpoint" in text
    assert "there are: `README.md`, `config.json`" in text


def test_a_root_without_a_tracker_says_which_iterations_it_has(tmp_path):
    names = [f"iter_{number:07d}/.metadata" for number in (10, 20)]
    text = message(folder_with(tmp_path / "run", *names, "iter_0000030/__0_0.distcp"))
    assert "has no `latest_checkpointed_iteration.txt`" in text
    assert "`iter_0000010`, `iter_0000020`, `iter_0000030`" in text
    assert f"give one of them: `{tmp_path / 'run'}/iter_0000020`, `{tmp_path / 'run'}/iter_0000010`" in text


def test_an_iteration_without_its_index_was_never_finished(tmp_path):
    assert "is an incomplete checkpoint: `.metadata` is missing" in message(
        folder_with(tmp_path / "x", "__0_0.distcp", "common.pt")
    )
    assert "is an incomplete checkpoint: `.metadata` is missing" in message(folder_with(tmp_path / "iter_0000007", "common.pt"))


def test_a_distributed_checkpoint_of_another_program_is_not_called_megatrons(tmp_path):
    dcp.save({"head.weight": torch.ones(4, 2), "optimizer": {"step": torch.ones(2)}}, checkpoint_id=tmp_path / "x", no_dist=True)
    text = message(LocalFolder(tmp_path / "x"))
    assert "is a distributed checkpoint of PyTorch's, but not Megatron's: it holds 2 tensors such as `head.weight`" in text
    assert "save_pretrained" in text
    dcp.save({"decoder.layers.mlp.linear_fc2.weight": torch.ones(4, 2)}, checkpoint_id=tmp_path / "mcore", no_dist=True)
    assert detect(LocalFolder(tmp_path / "mcore")) is Format.TORCH_DIST


@pytest.mark.parametrize(("names", "expected"), [
    (["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"], Format.DCP),
    (["model.model.layers.0.mlp.up_proj.weight", "optimizer.step"], Format.DCP),
    (["transformer.h.0.attn.c_attn.weight"], Format.DCP),
    (["model.decoder.layers.0.fc1.weight", "model.decoder.embed_tokens.weight"], Format.DCP),
    (["layers.0.attention.wq.weight"], Format.TITAN),
    (["layers.0.attention.qkv_linear.wq.weight", "state.norm.weight.exp_avg"], Format.TITAN),
    (["model.decoder.layers.0.mlp.linear_fc1.weight"], Format.TORCH_DCP),
])  # fmt: skip
def test_the_names_in_a_distributed_checkpoint_say_whose_it_is(tmp_path, names, expected):
    dcp.save({name: torch.ones(2) for name in names}, checkpoint_id=tmp_path, no_dist=True)
    assert detect(LocalFolder(tmp_path)) is expected


@pytest.mark.parametrize("names", [
    ["checkpoint-500/model.safetensors", "trainer_state.json"], ["weights/.metadata", "other/model.yaml"],
    ["style/adapter_config.json"], ["snapshots/abc/model.safetensors", "blobs/", "refs/main"],
])  # fmt: skip
def test_weights_in_a_folder_below_are_pointed_at(tmp_path, names):
    below = names[0].rpartition("/")[0]
    text = message(folder_with(tmp_path / "m", *names))
    assert f"has no weights itself; its sub-folders do: `{below}`" in text
    assert f"hint: give one of them: `{tmp_path / 'm'}/{below}`" in text


CONTENTS = {
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 12345\n", "a git-lfs pointer"),
    "html": (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", "a web page or an error message"),
    "xml": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "a web page or an error message"),
    "byte order mark": (b'\xef\xbb\xbf\r\n{"weight_map": {}}', "JSON behind a byte order mark"),
    "hub": (b"Entry not found", "an error message of a server"),
    "gated": (b"Access to model meta-llama/Llama-3.1-8B is restricted", "an error message of a server"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 64, "a GGUF file"),
    "zip": (b"PK\x03\x04" + b"\0" * 64, "a zip archive, as `torch.save` writes it"),
    "pickle": (b"\x80\x02}q\x00.", "a pickle, as `torch.save` writes it"),
    "zeros": (bytes(4096), "a file that starts with zero bytes"),
    "gzip": (b"\x1f\x8b\x08\0" + b"a" * 64, "a compressed file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"a" * 64, "an HDF5 file"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_saved_under_a_models_name_is_told_by_its_first_bytes(tmp_path, name):
    data, what = CONTENTS[name]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=f"^`model.safetensors` is {what}"):
        HuggingFaceReader(LocalFolder(tmp_path))


def test_a_real_header_is_never_taken_for_something_else(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert recognize((tmp_path / "model.safetensors").read_bytes()) is None


@pytest.mark.parametrize("name", ["git-lfs", "html"])
def test_other_files_of_a_checkpoint_are_told_likewise(tmp_path, name):
    data, what = CONTENTS[name]
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    with pytest.raises(UserError, match=f"`model.safetensors.index.json` is {what}"):
        HuggingFaceReader(LocalFolder(tmp_path))


def test_an_index_that_git_lfs_did_not_fetch_is_told(tmp_path):
    folder = folder_with(tmp_path / "m", ".metadata", "metadata.json")
    (tmp_path / "m" / ".metadata").write_bytes(CONTENTS["git-lfs"][0])
    with pytest.raises(UserError, match=r"^`\.metadata` is a git-lfs pointer, not the file itself"):
        read_index(folder)


def shards(folder, *names):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        save_file({f"w{number}": np.ones(2, "float32")}, folder / name)
    return LocalFolder(folder)


def test_numbered_files_without_an_index_are_the_model_and_others_are_not(tmp_path):
    wanted = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert (
        shard_names(shards(tmp_path / "m", *wanted, "consolidated.safetensors", "._model-00001-of-00002.safetensors")) == wanted
    )
    assert shard_names(shards(tmp_path / "one", "llama.safetensors", "consolidated.safetensors")) == ["llama.safetensors"]
    assert shard_names(shards(tmp_path / "alone", "consolidated.safetensors")) == ["consolidated.safetensors"]
    from_0 = ["part-0-of-2.safetensors", "part-1-of-2.safetensors"]
    assert shard_names(shards(tmp_path / "zero", *from_0)) == from_0


def test_a_missing_number_of_a_set_is_named(tmp_path):
    folder = shards(tmp_path / "m", "model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors")
    with pytest.raises(
        UserError, match=r"lacks `model-00002-of-00004.safetensors`, `model-00003-of-00004.safetensors`, of 4 files"
    ):
        shard_names(folder)
    (tmp_path / "m" / "model-00002-of-00004.safetensors.incomplete").write_bytes(b"x")
    with pytest.raises(UserError, match=r"hint: a download is incomplete \(`model-00002-of-00004.safetensors.incomplete`"):
        shard_names(folder)


def test_several_sets_without_an_index_are_not_chosen_from(tmp_path):
    folder = shards(tmp_path / "m", "model-00001-of-00001.safetensors", "ema-00001-of-00001.safetensors")
    with pytest.raises(
        UserError, match=r"files of several models: `ema-\*-of-00001.safetensors`, `model-\*-of-00001.safetensors`"
    ):
        shard_names(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, name):
    shards(tmp_path / "m", *([] if name == "model.safetensors" else ["model-00001-of-00002.safetensors"]))
    (tmp_path / "m" / name).symlink_to("../../blobs/0123abcd")
    with pytest.raises(UserError, match=rf"`{name}` of .* is a link to `../../blobs/0123abcd`, which does not exist"):
        shard_names(LocalFolder(tmp_path / "m"))


def test_a_missing_file_of_an_index_is_told_apart_from_a_broken_link(tmp_path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder = shards(tmp_path / "m", names[0])
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    with pytest.raises(UserError, match=rf"names `{names[1]}`, which is not in `"):
        shard_names(folder)
    (tmp_path / "m" / names[1]).symlink_to("../../blobs/0123abcd")
    with pytest.raises(UserError, match=rf"names `{names[1]}`, which is a link to `../../blobs/0123abcd`, which does not exist"):
        shard_names(folder)


@pytest.mark.parametrize(("path", "text"), [
    ("llama.gguf", "`llama.gguf` is a file: GGUF"), ("a/pytorch_model.bin", "`a/pytorch_model.bin` is a file: pickled PyTorch"),
    ("mp_rank_00/model_optim_rng.pt", "`mp_rank_00/model_optim_rng.pt` is a file: the state of one rank of a Megatron-LM"),
    ("m/model.safetensors", "`m/model.safetensors` is a file\n\nhint: give the directory that it is in: `m`"),
    ("model.safetensors", "`model.safetensors` is a file\n\nhint: give the directory that it is in: `.`"),
])  # fmt: skip
def test_a_file_instead_of_a_folder(path, text):
    with pytest.raises(UserError) as error:
        refuse_file(path)
    assert text in str(error.value)


def test_the_hint_for_pickled_weights_does_what_it_says(tmp_path, model_folder):
    """transformers, told to save again what it saved as a pickle, writes what can be converted."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    shutil.copytree(model_folder("gqa"), tmp_path / "m")
    torch.save(load_file(tmp_path / "m" / "model.safetensors"), tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    command = message(LocalFolder(tmp_path / "m")).partition("safetensors: `")[2].partition("`; then")[0]
    exec(command.replace('"OUT"', f'"{tmp_path / "out"}"'), {"AutoModelForCausalLM": AutoModelForCausalLM})
    assert detect(LocalFolder(tmp_path / "out")) is Format.HUGGINGFACE
