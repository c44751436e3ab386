"""What `conversion.json` says, and that it says the same whenever and wherever it is made."""

from __future__ import annotations

import json
import shutil
import socket
import struct
from hashlib import sha256

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from converter import hf_to_mcore, mcore_to_hf
from tests.converter.test_verify import edit


def record(folder):
    return json.loads(next(folder.glob("**/conversion.json")).read_text())


def hashes(folder):
    """The BLAKE3 of every tensor's bytes, as the safetensors library reads them."""
    tensors = [item for path in folder.glob("*.safetensors") for item in load_file(path).items()]
    return {name: blake3(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for name, tensor in tensors}


@pytest.mark.parametrize("variant", ["gqa", "tied", "padded_vocab", "attention_bias"])
@pytest.mark.parametrize("options", [{}, {"tp": 2, "pp": 2}], ids=str)
def test_both_ways_list_the_hash_of_every_tensor_of_the_source(model_folder, tmp_path, variant, options):
    folder = model_folder(variant, dtype="bfloat16", max_shard_size="60KB")
    hf_to_mcore(folder, tmp_path / "m", **options)
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert record(tmp_path / "m")["blake3"] == record(tmp_path / "back")["blake3"] == hashes(folder)


def test_an_export_with_a_cast_lists_the_hashes_of_what_it_wrote(model_folder, tmp_path):
    hf_to_mcore(model_folder("gqa", dtype="float32"), tmp_path / "m", tp=2, dtype="bf16")
    mcore_to_hf(tmp_path / "m", tmp_path / "back", dtype="fp16")
    assert record(tmp_path / "m")["blake3"] == hashes(model_folder("gqa", dtype="float32"))
    assert record(tmp_path / "back")["blake3"] == hashes(tmp_path / "back")
    assert record(tmp_path / "m")["casts"] == {"fp32": "bf16"}
    assert record(tmp_path / "back")["casts"] == {"bf16": "fp16"}


def test_tensors_that_pass_untouched_or_twice_are_listed_too(model_folder, tmp_path):
    shutil.copytree(model_folder("tied", dtype="bfloat16"), tmp_path / "hf")
    edit(tmp_path / "hf", lambda t: t.update({
        "lm_head.weight": t["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": t["model.norm.weight"][:4].clone(),
    }))  # fmt: skip
    hf_to_mcore(tmp_path / "hf", tmp_path / "m")
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert record(tmp_path / "m")["blake3"] == record(tmp_path / "back")["blake3"] == hashes(tmp_path / "hf")


def test_the_source_is_told_by_its_name_and_the_hashes_of_its_headers(model_folder, tmp_path):
    folder = model_folder("gqa", dtype="bfloat16", max_shard_size="60KB")
    hf_to_mcore(folder, tmp_path / "megatron", tp=2)
    source = record(tmp_path / "megatron")["source"]
    assert source["name"] == folder.name
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        header = data[: 8 + struct.unpack("<Q", data[:8])[0]]
        assert source["files"][path.name] == {"bytes": len(data), "header_sha256": sha256(header).hexdigest()}
    mcore_to_hf(tmp_path / "megatron", tmp_path / "back")
    source, iteration = record(tmp_path / "back")["source"], tmp_path / "megatron" / "iter_0000000"
    assert (source["name"], source["iteration"]) == ("megatron", "iter_0000000")
    assert {name: entry["sha256"] for name, entry in source["files"].items()} == {
        name: sha256((iteration / name).read_bytes()).hexdigest() for name in (".metadata", "__0_0.distcp", "__1_0.distcp")
    }


def test_a_source_of_the_hub_is_told_by_id_revision_and_sha256(model_folder, tmp_path):
    cache = tmp_path / "models--acme--tiny"
    snapshot, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model_folder("gqa").glob("*.*"):
        data = path.read_bytes()
        (blobs / sha256(data).hexdigest()).write_bytes(data)
        (snapshot / path.name).symlink_to(f"../../blobs/{sha256(data).hexdigest()}")
    hf_to_mcore(snapshot, tmp_path / "m")
    source = record(tmp_path / "m")["source"]
    assert (source["id"], source["revision"]) == ("acme/tiny", "0123abc")
    weights = (snapshot / "model.safetensors").read_bytes()
    assert source["files"]["model.safetensors"]["sha256"] == sha256(weights).hexdigest()


def test_options_and_counts_are_told_and_no_time_path_host_or_workers(model_folder, tmp_path):
    folder = model_folder("attention_bias", dtype="bfloat16")
    hf_to_mcore(folder, tmp_path / "m", tp=2, pp=2, pp_layout=[3, 1], workers=3, verify=True)
    conversion = record(tmp_path / "m")
    assert conversion["options"] == {
        "layout": "gpt", "tp": 2, "pp": 2, "vpp": 1, "layers": [3, 1], "dtype": "keep", "vocab_divisible_by": 128,
        "integrity": True,
    }  # fmt: skip
    assert conversion["tensors"] == {"in": 55, "out": 43}
    assert len(conversion["zero_filled"]) == 8
    text = json.dumps(conversion)
    assert str(tmp_path) not in text
    assert str(folder.parent) not in text
    assert socket.gethostname() not in text
    assert "workers" not in text
