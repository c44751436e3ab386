"""Optimizer state, whatever the way it is stored, has the names and shapes of the weights."""

from __future__ import annotations

import pickle
import tarfile
from functools import cache

import numpy as np
import pytest

from formats.detect import open_megatron
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.optimizer.open import open_optimizer
from formats.optimizer.state import MASTER, STATES
from formats.spec import extent
from tests.formats.test_kinds import FUSED
from tests.golden.kinds import unpacked


@pytest.fixture(scope="module")
def state_of(tmp_path_factory):
    @cache
    def opened(name):
        reader = open_megatron(LocalFolder(unpacked(name, tmp_path_factory.mktemp("kinds"))))
        readers.append(reader)
        return reader, open_optimizer(reader)

    readers = []
    yield opened
    for reader in readers:
        reader.close()


@pytest.mark.parametrize(("name", "kind", "step"), [
    ("zarr", "plain", 2), ("zarr_as_torch_dist", "plain", 2), ("ranks_tp2_pp2_as_torch_dist", "fully_reshardable", 3),
])  # fmt: skip
def test_state_in_the_shapes_of_weights(state_of, name, kind, step):
    reader, optimizer = state_of(name)
    assert optimizer.kind == kind
    assert set(optimizer.states) == set(STATES)
    shapes = {name: spec.shape for name, spec in reader.specs.items()}
    assert {name: spec.shape for name, spec in optimizer.states[MASTER].specs.items()} == shapes
    assert [[group["step"] for group in groups] for groups in optimizer.groups] == [[step, step]]


def test_experts_have_an_optimizer_of_their_own(state_of):
    _, optimizer = state_of("ranks_ep2_as_torch_dist")
    assert [{group["is_expert_parallel"] for group in groups} for groups in optimizer.groups] == [{False}, {True}]


def values(optimizer):
    """Every tensor of the state: shape, dtype and bytes."""
    contents = {}
    for state, reader in optimizer.states.items():
        for name, spec in reader.specs.items():
            out = np.empty(spec.shape, spec.dtype)
            reader.read(name, spec.full_region, out)
            contents[state, name] = spec.shape, spec.dtype, out.tobytes()
    return contents


def fused(contents):
    """The same under the names of Transformer Engine's norms."""
    for norm, name_there in FUSED.items():
        contents = {(state, name.replace(norm, name_there)): value for (state, name), value in contents.items()}
    return contents


TWINS = [
    ("zarr_distributed_optimizer_flattened", "zarr_distributed_optimizer"),
    ("zarr_distributed_optimizer_buckets", "zarr_distributed_optimizer"),
    ("ranks_tp2_pp2_buckets", "ranks_tp2_pp2_as_torch_dist"),
    ("ranks_pp2_vpp2_buckets", "ranks_pp2_vpp2_as_torch_dist"),
    ("ranks_ep2_buckets", "ranks_ep2_as_torch_dist"),
    ("zarr_distributed_optimizer_gathered", "zarr_distributed_optimizer"),
    ("ranks_tp2_pp2_gathered", "ranks_tp2_pp2_as_torch_dist"),
]


@pytest.mark.parametrize(("name", "twin"), TWINS)
def test_state_stored_flat_is_that_of_the_twin(state_of, name, twin):
    reader, optimizer = state_of(name)
    expected = state_of(twin)[1]
    assert values(optimizer) == values(expected)
    assert {name for _, name in values(optimizer)} == reader.specs.keys()
    assert optimizer.groups == expected.groups


@pytest.mark.parametrize(("name", "twin"), TWINS)
def test_any_region_of_state_stored_flat(state_of, name, twin):
    """Rows, columns and both, also over the seams of ranks."""
    masters = state_of(name)[1].states[MASTER]
    rng = np.random.default_rng(3)
    for weight, spec in masters.specs.items():
        whole = np.empty(spec.shape, spec.dtype)
        state_of(twin)[1].states[MASTER].read(weight, spec.full_region, whole)
        for _ in range(8):
            cuts = [sorted(rng.integers(0, size, 2)) for size in spec.shape]
            region = tuple(slice(int(start), int(stop) + 1) for start, stop in cuts)
            out = np.empty(extent(region), spec.dtype)
            masters.read(weight, region, out)
            assert out.tobytes() == whole[region].tobytes()


def test_six_buckets_of_three_ranks_are_the_same_in_files_of_ranks_and_in_torch_dist(state_of, golden, tmp_path):
    with tarfile.open(golden / "optimizer_state" / "by_buckets.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    reader = open_megatron(LocalFolder(tmp_path / "by_buckets"))
    expected = values(open_optimizer(reader))
    reader.close()
    assert len(expected) == 45
    assert fused(values(state_of("ranks_dp3_six_buckets")[1])) == expected


def test_numbered_state_of_torch_dcp_is_that_of_the_twin(state_of):
    own, twin = (state_of(name)[1] for name in ("torch_dcp", "torch_dcp_as_torch_dist"))
    assert own.kind == "torch_dcp"
    assert fused(values(own)) == values(twin)
    assert len(values(own)) == 45
    assert own.groups == twin.groups


@pytest.mark.parametrize(("key", "message"), [
    ("optimizer.optimizer.state.3.exp_avg", "has no `exp_avg` of its weight 3"),
    ("optimizer.optimizer.state.10.step", "has no `step` of its weight 10"),
    ("optimizer.fp32_from_fp16_params.1.4", "has no master of `decoder.final_layernorm.weight`"),
    ("model.decoder.layers.1.mlp.linear_fc2.weight", "state of 2 weights that are not there, or in another order"),
])  # fmt: skip
def test_numbered_state_that_is_incomplete_is_named(tmp_path, key, message):
    root = unpacked("torch_dcp", tmp_path)
    (path,) = root.glob("*/.metadata")
    index = pickle.loads(path.read_bytes())
    del index.state_dict_metadata[key]
    index.storage_data = {location: stored for location, stored in index.storage_data.items() if location.fqn != key}
    path.write_bytes(pickle.dumps(index))
    reader = open_megatron(LocalFolder(root))
    with pytest.raises(UserError, match=message):
        open_optimizer(reader)
    reader.close()
