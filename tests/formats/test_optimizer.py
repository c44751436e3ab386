"""Optimizer state, whatever the way it is stored, has the names and shapes of the weights."""

from __future__ import annotations

import pytest

from formats.detect import open_megatron
from formats.folder import LocalFolder
from formats.optimizer.open import open_optimizer
from formats.optimizer.state import MASTER, STATES
from tests.golden.kinds import unpacked


@pytest.fixture(scope="module")
def state_of(tmp_path_factory):
    readers = []

    def opened(name):
        readers.append(open_megatron(LocalFolder(unpacked(name, tmp_path_factory.mktemp("kinds")))))
        return readers[-1], open_optimizer(readers[-1])

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
