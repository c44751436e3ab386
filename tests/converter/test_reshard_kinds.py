"""Checkpoints of any kind are resharded with their optimizer, and those of one state become the same."""

from __future__ import annotations

import io
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from converter import Reporter, check, reshard
from formats.detect import open_megatron
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.optimizer.open import open_optimizer
from formats.optimizer.state import STATES
from tests.converter.test_kinds import LLAMA
from tests.formats.test_optimizer import values
from tests.golden.kinds import unpacked

SMALL = {**LLAMA, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
EXPERTS = {
    "intermediate_size": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.01,
    "output_router_logits": True,
}
MODELS = {
    "ranks_pp2_vpp2": {**SMALL, "num_hidden_layers": 4},
    "torch_dcp": LLAMA,
    "ranks_ep2": {**SMALL, **EXPERTS, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
}
TWINS = [
    ("zarr", "zarr_as_torch_dist"), ("zarr_distributed_optimizer", "zarr_distributed_optimizer_flattened"),
    ("ranks_tp2_pp2", "ranks_tp2_pp2_as_torch_dist"), ("ranks_pp2_vpp2", "ranks_pp2_vpp2_as_torch_dist"),
    ("torch_dcp", "torch_dcp_as_torch_dist"), ("ranks_ep2", "ranks_ep2_as_torch_dist"),
]  # fmt: skip


def _say(file, **settings):
    """Correct `args` that no `config.json` can mean."""
    state = torch.load(file, weights_only=False)
    vars(state["args"]).update(settings)
    torch.save(state, file)


def resharded(name, folder, config, source=None, **sizes):
    """What a reshard of a golden holds: weights, optimizer state, groups and common state, and the notes there were."""
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "config.json").write_text(json.dumps(config))
    source, notes = source or unpacked(name, folder), []
    for common in source.glob("*/common.pt"):
        _say(common, normalization="RMSNorm")  # megatron-core 0.8.0's norms have no biases, and its `args` say LayerNorm
    reporter = Reporter(note=notes.append)
    reshard(source, folder / "made", hf_config=folder / "config", verify=True, reporter=reporter, **sizes)
    reader = open_megatron(LocalFolder(folder / "made"))
    reader.check()
    optimizer = open_optimizer(reader)
    if sizes.get("weights_only"):
        return reader, optimizer, notes
    assert optimizer.kind == "fully_reshardable"
    assert set(optimizer.states) == set(STATES)
    return reader, optimizer, notes


@pytest.mark.parametrize(("name", "twin"), TWINS)
def test_twins_become_the_same(tmp_path, name, twin):
    first, second = (resharded(kind, tmp_path / kind, MODELS.get(name, SMALL), pp=2) for kind in (name, twin))
    assert values(first[1]) == values(second[1])
    assert {state for state, _ in values(first[1])} == set(STATES)
    assert first[1].groups == second[1].groups
    assert first[0].common_state()["opt_param_scheduler"] == second[0].common_state()["opt_param_scheduler"]
    assert first[0].args()["pipeline_model_parallel_size"] == 2
    assert first[0].args()["tensor_model_parallel_size"] == 1
    assert any("random numbers start anew" in note for note in first[2]) == (name != "ranks_pp2_vpp2")


def test_random_numbers_travel_where_the_layout_is_the_same(tmp_path):
    reader, _, notes = resharded("zarr", tmp_path, SMALL, tp=2, pp=2)
    assert not any("random numbers" in note for note in notes)
    assert not reader.args().get("no_save_rng")
    stored = {name for name in reader.container.object_names if name.startswith("rng_state/")}
    assert stored == {f"rng_state/shard_{pp}.{tp}_2.2" for pp in range(2) for tp in range(2)}
    source = open_megatron(LocalFolder(unpacked("zarr", tmp_path / "again")))
    assert all(reader.container.archive(name).data() == source.container.archive(name).data() for name in stored)


LEFT_OUT = {
    "another layout": ("ranks_tp2_pp2", {}, "their states are of the ranks of another layout"),
    "experts together": ("ranks_ep2", {}, "their states are of the ranks of another layout"),
    "experts apart": ("ranks_ep2", {"ep": 2}, "`torch_dist` has no states for each of the ranks that divide experts"),
    "another kind": ("torch_dcp", {}, "their states are not read from this kind of checkpoint"),
    "none": ("ranks_tp2_pp2", {"tp": 2, "pp": 2}, "the checkpoint does not hold their states"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_why_random_numbers_start_anew_is_said(tmp_path, case):
    name, layout, reason = LEFT_OUT[case]
    source = unpacked(name, tmp_path)
    for file in source.glob("*/mp_rank_*/model_optim_rng.pt") if case == "none" else ():
        state = torch.load(file, weights_only=False)
        del state["rng_state"], state["args"].no_save_rng  # which an older Megatron-LM did not have
        torch.save(state, file)
    reader, _, notes = resharded(name, tmp_path / "work", MODELS.get(name, SMALL), source=source, **layout)
    assert f"random numbers start anew: {reason} (Megatron-LM: `--no-load-rng`)" in notes
    assert not any(stored.startswith("rng_state") for stored in reader.container.object_names)
    assert reader.args()["no_save_rng"]


def test_a_step_that_is_not_known_is_said(tmp_path):
    source, message = unpacked("zarr", tmp_path), "the step and the schedule are not read from this kind of checkpoint"
    assert not any(message in note for note in resharded("zarr", tmp_path / "known", SMALL)[2])
    common = source / "iter_0000002" / "common.pt"
    state = torch.load(common, weights_only=False)
    torch.save({name: value for name, value in state.items() if name != "iteration"}, common)
    _, _, notes = resharded("zarr", tmp_path / "work", SMALL, source=source)
    assert f"{message}: training counts from step 0" in notes


def test_experts_and_their_optimizer_change_their_ranks(tmp_path):
    twin = open_optimizer(open_megatron(LocalFolder(unpacked("ranks_ep2_as_torch_dist", tmp_path / "twin"))))
    _, optimizer, _ = resharded("ranks_ep2", tmp_path, MODELS["ranks_ep2"], tp=2, ep=4, etp=1)
    assert sorted(map(str, values(optimizer).values())) == sorted(map(str, values(twin).values()))  # norms have other names
    assert optimizer.groups == twin.groups
    assert len(optimizer.groups) == 2


@pytest.mark.parametrize("dtype", ["keep", "fp16"])
def test_weights_may_be_taken_from_masters(tmp_path, dtype):
    """With the optimizer's state beside them, and in any dtype without it."""
    masters = values(open_optimizer(open_megatron(LocalFolder(unpacked("ranks_tp2_pp2_as_torch_dist", tmp_path / "source")))))
    made, optimizer, _ = resharded(
        "ranks_tp2_pp2_as_torch_dist",
        tmp_path,
        SMALL,
        tp=2,
        pp=2,
        values_from="master",
        dtype=dtype,
        weights_only=dtype != "keep",
    )
    for name, spec in made.specs.items():
        out = np.empty(spec.shape, spec.dtype)
        made.read(name, spec.full_region, out)
        _, _, master = masters["param", name]
        assert out.tobytes() == np.frombuffer(master, np.float32).reshape(spec.shape).astype(spec.dtype).tobytes()
    assert {spec.stored_dtype for spec in made.specs.values()} == {"fp32" if dtype == "keep" else dtype}
    assert optimizer is None if dtype != "keep" else values(optimizer) == masters


SCALE = {"scale": torch.tensor([1024.0]), "growth_tracker": 7, "hysteresis_tracker": 2}


def _in_common_state(source):
    common = source / "iter_0000002" / "common.pt"
    state = torch.load(common, weights_only=False)
    torch.save({**state, "optimizer": {**state["optimizer"], "grad_scaler": SCALE}}, common)


def _in_files_of_ranks(source):
    for file in source.glob("*/mp_rank_*/model_optim_rng.pt"):
        state = torch.load(file, weights_only=False)
        torch.save({**state, "optimizer": {**state["optimizer"], "grad_scaler": SCALE}}, file)


def _as_objects(source):
    """As a distributed optimizer saves it that is `dp_reshardable`: once for each group of ranks."""
    (iteration,) = source.glob("iter_*")
    metadata = pickle.loads((iteration / ".metadata").read_bytes())
    for group in range(4):
        file = iteration / f"__{90 + group}_0.distcp"
        torch.save([SCALE], file)
        key = f"optimizer.distributed.dp_group_idx_{group}.grad_scaler/shard_0_1"
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo(file.name, 0, file.stat().st_size)
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))


def _field_by_field(source):
    """As `torch_dcp` does."""
    (iteration,) = source.glob("iter_*")
    dcp_to_torch_save(iteration, source / "all.pt")
    state = torch.load(source / "all.pt", weights_only=False)
    shutil.rmtree(iteration)
    dcp.save({**state, "optimizer": {**state["optimizer"], "grad_scaler": SCALE}}, checkpoint_id=iteration, no_dist=True)


SCALED = {
    "zarr": _in_common_state, "ranks_tp2_pp2": _in_files_of_ranks, "ranks_plain_tp2_pp2_tied": _in_files_of_ranks,
    "ranks_tp2_pp2_buckets": _as_objects, "torch_dcp": _field_by_field,
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_the_loss_scale_of_fp16_travels(tmp_path, name):
    source = unpacked(name, tmp_path)
    SCALED[name](source)
    config = {**SMALL, "tie_word_embeddings": True} if "tied" in name else MODELS.get(name, SMALL)
    reader, _, _ = resharded(name, tmp_path / "work", config, source=source)
    (made,) = torch.load(io.BytesIO(reader.common_archive().data()), weights_only=False)
    assert made["optimizer"]["grad_scaler"] == SCALE


def test_masters_of_weights_that_were_quantized_are_not_compared_and_that_is_said(tmp_path):
    """What is stored of weights in FP8 is not what their masters round to."""
    source = unpacked("zarr", tmp_path)
    iteration = source / "iter_0000002"
    chunk = iteration / "decoder.final_layernorm.weight" / "0"
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    with pytest.raises(UserError, match=r"the fp32 master of `decoder.final_layernorm.weight` does not round to the weight"):
        resharded("zarr", tmp_path / "refused", SMALL, source=source)
    assert check(source).wrong_masters == ["decoder.final_layernorm.weight"]
    _say(iteration / "common.pt", fp8_param_gather=True)
    _, optimizer, notes = resharded("zarr", tmp_path / "work", SMALL, source=source)
    assert any("masters were not compared with the weights, which were in FP8" in note for note in notes)
    assert values(optimizer)
    with pytest.raises(UserError, match="which were in FP8 or FP4 while they were trained"):
        check(source)
