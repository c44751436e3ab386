"""Optimizer state of megatron-core up to 0.14: numbers of optimizers in its names, and damage to the shapes it had before."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from formats.detect import open_megatron
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.optimizer.open import open_optimizer
from formats.optimizer.state import STATES
from tests.formats.test_optimizer import values
from tests.golden.kinds import unpacked

FC1 = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture
def iteration(tmp_path):
    return next(unpacked("zarr_distributed_optimizer_flattened", tmp_path).glob("iter_*"))


def edit(iteration, change) -> None:
    """Change the index, as torch's objects."""
    index = pickle.loads((iteration / ".metadata").read_bytes())
    change(index)
    (iteration / ".metadata").write_bytes(pickle.dumps(index))


def optimizer(iteration):
    return open_optimizer(open_megatron(LocalFolder(iteration)))


def renamed(index, name_of) -> None:
    index.state_dict_metadata = {name_of(name): entry for name, entry in index.state_dict_metadata.items()}
    index.storage_data = {dataclasses.replace(key, fqn=name_of(key.fqn)): info for key, info in index.storage_data.items()}
    index.mcore_data = {name_of(name): entry for name, entry in index.mcore_data.items()}


def with_number(name):
    """The name that megatron-core up to 0.14 gives the state in a model with experts, here those with `mlp` in their names."""
    return f"chained_{int('.mlp.' in name)}.{name}" if name.startswith("optimizer.state.") else name


def test_names_with_the_number_of_an_optimizer(iteration):
    expected = optimizer(iteration)
    edit(iteration, lambda index: renamed(index, with_number))
    common = torch.load(iteration / "common.pt", weights_only=False)
    common["optimizer"] = {0: common["optimizer"], 1: common["optimizer"]}
    torch.save(common, iteration / "common.pt")
    chained = optimizer(iteration)
    assert values(chained) == values(expected)
    assert set(chained.states) == set(STATES)
    assert chained.groups == [*expected.groups, *expected.groups]


def test_state_of_two_optimizers_under_one_name_is_refused(iteration):
    def twice(index):
        copies = {f"chained_1.{name}": name for name in index.mcore_data if "fp32_param" in name}
        for copy, name in copies.items():
            index.state_dict_metadata[copy] = index.state_dict_metadata[name]
            index.mcore_data[copy] = index.mcore_data[name]

    edit(iteration, twice)
    with pytest.raises(UserError, match=r"^`optimizer\.state\.fp32_param\..* is stored by two optimizers"):
        optimizer(iteration)


@pytest.mark.parametrize("shape", [(2, 96, 31), (2, 90, 32), (96, 32), (2, 32, 96), (2, 192, 32), (0, 96, 32)])
def test_shapes_that_the_stored_shards_do_not_fill_are_refused(iteration, shape):
    def change(index):
        index.mcore_data[FC1]["nd_reformulated_orig_global_shape"] = shape

    edit(iteration, change)
    with pytest.raises(UserError) as refusal:
        optimizer(iteration)
    stored = f"`{FC1}` of shape {list(shape)} is stored as [2, 4, 1, 768], which are not shards of it, each flat"
    weight = f"`{FC1}` has shape {list(shape)}, and `{FC1.removeprefix('optimizer.state.exp_avg.')}` has [2, 96, 32]"
    assert refusal.value.args[0] in (stored, weight)


def test_flattened_state_without_its_shape_is_named(iteration):
    edit(iteration, lambda index: index.mcore_data.pop(FC1))
    with pytest.raises(UserError) as refusal:
        optimizer(iteration)
    assert refusal.value.args[0] == f"`{FC1}` has shape [2, 4, 1, 768], and `{FC1[24:]}` has [2, 96, 32]"


def test_the_state_of_another_optimizer_than_adam_is_named(iteration):
    edit(iteration, lambda index: renamed(index, lambda name: name.replace("exp_avg_sq", "momentum_buffer")))
    with pytest.raises(UserError, match=r"^the optimizer keeps `momentum_buffer` of `.*`: it is not Adam"):
        optimizer(iteration)
