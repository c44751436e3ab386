"""Other kinds of Megatron checkpoints are exported, verified and inspected as `torch_dist` is."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from converter import check_checkpoint, hf_to_mcore, inspect, mcore_to_hf, verify
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.torch_dist import TorchDistReader
from tests.converter import family_suite
from tests.formats import zarr_arrays
from tests.golden.kinds import unpacked

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 89,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def as_zarr(iteration, folder):
    """Store the keys of a checkpoint as the `zarr` format has them: a chunk for each shard."""
    reader = TorchDistReader(LocalFolder(iteration))
    for key in reader.container.tensor_names:
        tensor = reader.container.tensor(key)
        value = np.empty(tensor.shape, tensor.dtype)
        reader.container.read(tensor, tuple(slice(0, size) for size in tensor.shape), value)
        zarr_arrays.write(folder / key, value, chunks=tuple(part.stop - part.start for part in tensor.chunks[0].region))
    zarr_arrays.mark(folder)
    return folder


def weights(folder):
    return {name: value.tobytes() for name, value in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_export_of_zarr_is_that_of_torch_dist(tmp_path, family):
    source = family_suite.save_small(family, tmp_path / "hf")
    hf_to_mcore(source, tmp_path / "m", tp=2, pp=2)
    zarr = as_zarr(tmp_path / "m" / "iter_0000000", tmp_path / "z" / "iter_0000000")
    (tmp_path / "z" / "latest_checkpointed_iteration.txt").write_text("0")
    mcore_to_hf(tmp_path / "z", tmp_path / "back", hf_config=source)
    assert weights(tmp_path / "back") == weights(source)
    assert verify(tmp_path / "z", source).same
    report = inspect(tmp_path / "z")
    assert (report.format, report.layout["tp"]) == ("Megatron zarr", 2)
    assert json.loads((tmp_path / "back" / "conversion.json").read_text())["source"]["format"] == "zarr"
    (zarr / "decoder.final_layernorm.weight" / "0").unlink()
    with pytest.raises(UserError, match=r"chunk `decoder.final_layernorm.weight/0` is missing"):
        mcore_to_hf(tmp_path / "z", tmp_path / "again", hf_config=source)
    assert not (tmp_path / "again").exists()


def test_an_export_of_torch_dcp_is_that_of_its_twin(tmp_path, config):
    for name in ("torch_dcp", "torch_dcp_as_torch_dist"):
        mcore_to_hf(unpacked(name, tmp_path), tmp_path / name / "hf", hf_config=config)
    exported, twin = (tmp_path / name / "hf" / "model.safetensors" for name in ("torch_dcp", "torch_dcp_as_torch_dist"))
    assert exported.read_bytes() == twin.read_bytes()
    assert len(load_file(exported)) == 21
    assert inspect(unpacked("torch_dcp", tmp_path / "more")).format == "Megatron torch_dcp"


def test_an_export_of_files_of_ranks_is_that_of_its_twin(tmp_path, config):
    small = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    (config / "config.json").write_text(json.dumps({**LLAMA, **small}))
    for name in ("ranks_tp2_pp2", "ranks_tp2_pp2_as_torch_dist"):
        mcore_to_hf(unpacked(name, tmp_path), tmp_path / name / "hf", hf_config=config)
    assert weights(tmp_path / "ranks_tp2_pp2" / "hf") == weights(tmp_path / "ranks_tp2_pp2_as_torch_dist" / "hf")
    assert verify(tmp_path / "ranks_tp2_pp2" / "A_torch", tmp_path / "ranks_tp2_pp2" / "hf").same
    report = inspect(tmp_path / "ranks_tp2_pp2" / "A_torch")
    assert (report.format, report.layout["tp"], report.optimizer_state) == ("Megatron mp_rank files", 2, True)


def test_megatron_fsdp_exports_its_masters_in_the_dtype_that_is_asked_for(tmp_path, config):
    root = unpacked("fsdp_dtensor", tmp_path)
    mcore_to_hf(root, tmp_path / "fp32", hf_config=config)
    mcore_to_hf(root, tmp_path / "bf16", hf_config=config, dtype="bf16")
    full, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "bf16"))
    assert {value.dtype.name for value in full.values()} == {"float32"}
    assert all(full[name].astype(value.dtype).tobytes() == value.tobytes() for name, value in rounded.items())
    gate, up = (full[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    stored = TorchDistReader(LocalFolder(root)).container
    for half, suffix in ((gate, "_w"), (up, "_v")):
        tensor = stored.tensor(f"model.module.decoder.layers.1.mlp.linear_fc1.weight{suffix}")
        value = np.empty(tensor.shape, tensor.dtype)
        stored.read(tensor, tuple(slice(0, size) for size in tensor.shape), value)
        assert value.tobytes() == half.tobytes()


@pytest.mark.parametrize("name", ["ranks_tp2_pp2", "ranks_ep2", "torch_dcp"])
def test_verify_knows_both_spellings_of_norms(tmp_path, name):
    kind, twin = (unpacked(each, tmp_path) for each in (name, f"{name}_as_torch_dist"))
    assert verify(kind, twin).same
    assert verify(twin, kind).same


def test_weights_that_their_settings_do_not_describe_are_compared_under_megatrons_names(tmp_path):
    """`args` of megatron-core 0.8.0 say LayerNorm, whose biases the weights lack."""
    zarr, twin, other = (unpacked(name, tmp_path) for name in ("zarr", "zarr_as_torch_dist", "ranks_tp2_pp2"))
    same = verify(zarr, twin)
    assert same.same
    assert same.tensors == 15
    for left, right in ((zarr, other), (other, zarr)):
        compared = verify(left, right)
        assert len(compared.different) > 0
        assert not compared.only_in_one + compared.only_in_other
    with pytest.raises(UserError) as refused:
        verify(zarr, unpacked("ranks_ep2", tmp_path))
    assert "hint: `config.json`, or the settings that stand in for it (`run_config.yaml`, `args`), describes" in str(
        refused.value
    )
    next(zarr.glob("*/decoder.final_layernorm.weight/0")).unlink()
    with pytest.raises(UserError, match=r"chunk `decoder.final_layernorm.weight/0` is missing"):
        verify(zarr, twin)


def test_a_check_that_has_nothing_to_compare_with_says_so(tmp_path):
    root = unpacked("ranks_tp2_pp2", tmp_path)
    (next(root.glob("*/mp_rank_00_000")) / "layer_wise_optimizer_0.pt").touch()
    with pytest.raises(UserError) as refused:
        check_checkpoint(root)
    text = (
        r"`.*` has no `integrity.json`: there are no hashes to check it against; not compared with fp32 masters: 15 weights: "
        r"`mp_rank_00_000/layer_wise_optimizer_0.pt` is of a layer-wise optimizer"
    )
    assert re.match(text, str(refused.value))
    assert "hint: `mbconvert verify A B` compares it with another checkpoint of the same weights" in str(refused.value)


def test_a_release_is_read_as_an_iteration_is(tmp_path, config):
    small = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    (config / "config.json").write_text(json.dumps({**LLAMA, **small}))
    root = unpacked("ranks_tp2_pp2", tmp_path)
    mcore_to_hf(root, tmp_path / "iteration", hf_config=config)
    next(root.glob("iter_*")).rename(root / "release")
    (root / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert inspect(root).iteration == "release"
    mcore_to_hf(root, tmp_path / "out", hf_config=config)
    assert weights(tmp_path / "out") == weights(tmp_path / "iteration")
