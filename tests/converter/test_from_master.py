"""`--from master` exports the fp32 masters of optimizer state, here of checkpoints that Megatron-LM 0.19.0 wrote."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, load

from converter import UserError, hf_to_mcore, mcore_to_hf, verify_checkpoints
from converter.cli import cli
from converter.master_reader import reader_of
from formats.detect import open_megatron
from formats.folder import LocalFolder
from tests.converter import family_suite, test_kinds
from tests.golden.kinds import unpacked

LLAMA = {**test_kinds.LLAMA, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture
def root(tmp_path):
    return unpacked("ranks_tp2_pp2_as_torch_dist", tmp_path)


def read(folder):
    return load_file(folder / "model.safetensors")


def test_masters_are_exported_and_round_to_the_weights(tmp_path, config, root):
    mcore_to_hf(root, tmp_path / "weights", hf_config=config)
    mcore_to_hf(root, tmp_path / "masters", hf_config=config, values_from="master", verify=True)
    weights, masters = read(tmp_path / "weights"), read(tmp_path / "masters")
    assert {value.dtype for value in masters.values()} == {torch.float32}
    assert weights.keys() == masters.keys()
    assert all(torch.equal(masters[name].bfloat16(), value) for name, value in weights.items())
    assert not all(torch.equal(masters[name], value.float()) for name, value in weights.items())
    assert torch.equal(masters["lm_head.weight"], stored(root, "optimizer.state.param.output_layer.weight")[:89])
    assert json.loads((tmp_path / "masters" / "config.json").read_text())["dtype"] == "float32"


def stored(root, key):
    reader = FileSystemReader(root / "iter_0000003")
    value = {key: torch.empty(reader.read_metadata().state_dict_metadata[key].size)}
    load(value, storage_reader=reader, no_dist=True)
    return value[key]


def test_the_cast_from_masters_is_the_only_one(tmp_path, config, root):
    mcore_to_hf(root, tmp_path / "fp32", hf_config=config, values_from="master")
    mcore_to_hf(root, tmp_path / "fp16", hf_config=config, values_from="master", dtype="fp16")
    full, half = read(tmp_path / "fp32"), read(tmp_path / "fp16")
    assert all(torch.equal(full[name].half(), value) for name, value in half.items())


@pytest.mark.parametrize("dtype", ["keep", "fp32", "fp16"])
def test_verify_compares_an_export_with_the_masters_it_was_made_of(tmp_path, config, root, dtype):
    mcore_to_hf(root, tmp_path / "out", hf_config=config, values_from="master", dtype=dtype)
    assert verify_checkpoints(root, tmp_path / "out").same
    assert verify_checkpoints(tmp_path / "out", root).same
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert not verify_checkpoints(root, tmp_path / "out").same


def test_the_record_and_the_partial_directory_say_where_values_come_from(tmp_path, config, root):
    for values_from in ("weights", "master"):
        mcore_to_hf(root, tmp_path / values_from, hf_config=config, values_from=values_from, dtype="fp32")
    records = {name: json.loads((tmp_path / name / "conversion.json").read_text()) for name in ("weights", "master")}
    assert records["master"]["options"]["from"] == "master"
    assert "from" not in records["weights"]["options"]
    assert records["master"]["casts"] == {}
    assert records["weights"]["casts"] == {"bf16": "fp32"}


def test_state_that_is_wrong_is_refused_by_name(tmp_path, config, golden):
    with tarfile.open(golden / "optimizer_state" / "shifted.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    shifted = tmp_path / "shifted"
    with pytest.raises(UserError, match=r"^the fp32 master of `[a-z_.0-9]+` does not round to the weight\n\nhint: the w"):
        mcore_to_hf(shifted, tmp_path / "out", hf_config=config, values_from="master")
    assert not (tmp_path / "out").exists()
    mcore_to_hf(shifted, tmp_path / "out", hf_config=config)


def test_a_checkpoint_without_masters_is_refused_by_count_and_name(tmp_path):
    source = family_suite.save_small("llama", tmp_path / "hf")
    hf_to_mcore(source, tmp_path / "bf16", dtype="bf16")
    with pytest.raises(UserError, match=r"has no fp32 masters of 27 of 27 weights: `embedding.*` and 24 more"):
        mcore_to_hf(tmp_path / "bf16", tmp_path / "out", values_from="master", dry_run=True)


def test_weights_in_fp32_are_their_own_masters(tmp_path):
    source = family_suite.save_small("llama", tmp_path / "hf")
    hf_to_mcore(source, tmp_path / "m", dtype="fp32")
    for values_from in ("weights", "master"):
        mcore_to_hf(tmp_path / "m", tmp_path / values_from, values_from=values_from)
    from_weights, from_masters = (tmp_path / name / "model.safetensors" for name in ("weights", "master"))
    assert from_weights.read_bytes() == from_masters.read_bytes()


def test_any_region_of_a_master_proves_itself(root):
    reader = open_megatron(LocalFolder(root))
    masters, name = reader_of(reader, "master"), "decoder.layers.1.mlp.linear_fc2.weight"
    spec = masters.specs[name]
    whole, weight = np.empty(spec.shape, spec.dtype), np.empty(spec.shape, reader.specs[name].dtype)
    masters.read(name, spec.full_region, whole)
    reader.read(name, spec.full_region, weight)
    assert whole.astype(weight.dtype).tobytes() == weight.tobytes()
    part = np.empty((3, 5), spec.dtype)
    masters.read(name, (slice(7, 10), slice(2, 7)), part)
    assert (part == whole[7:10, 2:7]).all()


def test_the_command_takes_it_and_quantizing_refuses_it(tmp_path, config, root):
    arguments = ["mcore-to-hf", str(root), str(tmp_path / "out"), "--hf-config", str(config), "--from", "master", "--json"]
    answer = CliRunner().invoke(cli, [*arguments, "--dry-run"])
    assert answer.exit_code == 0
    plain = CliRunner().invoke(cli, [*arguments[:-3], "--dry-run", "--json"])
    assert json.loads(answer.stdout)["total_bytes"] > 1.5 * json.loads(plain.stdout)["total_bytes"]
    with pytest.raises(UserError, match="which are what masters round to\n\nhint: leave out `--from master`"):
        mcore_to_hf(root, tmp_path / "out", hf_config=config, values_from="master", quantize="fp8-block")
    with pytest.raises(UserError, match="values_from `masters` is not one of weights, master"):
        mcore_to_hf(root, tmp_path / "out", hf_config=config, values_from="masters")
