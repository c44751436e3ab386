"""Checkpoints of any kind are resharded with their optimizer, and those of one state become the same."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch

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
    one, other = (resharded(kind, tmp_path / kind, MODELS.get(name, SMALL), pp=2) for kind in (name, twin))
    assert values(one[1]) == values(other[1])
    assert {state for state, _ in values(one[1])} == set(STATES)
    assert one[1].groups == other[1].groups
    assert one[0].common_state()["opt_param_scheduler"] == other[0].common_state()["opt_param_scheduler"]
    assert one[0].args()["pipeline_model_parallel_size"] == 2
    assert one[0].args()["tensor_model_parallel_size"] == 1
    assert any("random numbers start anew" in note for note in one[2])


def test_random_numbers_travel_where_the_layout_is_the_same(tmp_path):
    reader, _, notes = resharded("zarr", tmp_path, SMALL, tp=2, pp=2)
    assert not any("random numbers" in note for note in notes)
    stored = {name for name in reader.container.object_names if name.startswith("rng_state/")}
    assert stored == {f"rng_state/shard_{pp}.{tp}_2.2" for pp in range(2) for tp in range(2)}
    source = open_megatron(LocalFolder(unpacked("zarr", tmp_path / "again")))
    assert all(reader.container.archive(name).data() == source.container.archive(name).data() for name in stored)


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


def test_the_loss_scale_of_fp16_travels(tmp_path):
    source = unpacked("zarr", tmp_path)
    scale = {"scale": torch.tensor([1024.0]), "growth_tracker": 7, "hysteresis_tracker": 2}
    common = source / "iter_0000002" / "common.pt"
    state = torch.load(common, weights_only=False)
    torch.save({**state, "optimizer": {**state["optimizer"], "grad_scaler": scale}}, common)
    reader, _, _ = resharded("zarr", tmp_path / "work", SMALL, source=source, tp=2)
    (made,) = torch.load(io.BytesIO(reader.common_archive().data()), weights_only=False)
    assert made["optimizer"]["grad_scaler"] == scale


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
