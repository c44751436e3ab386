"""Optimizer state of Megatron-FSDP is what torch's own loader reads, under the names of the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from formats.detect import open_megatron
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.optimizer.open import open_optimizer
from formats.optimizer.state import EXP_AVG, EXP_AVG_SQ, MASTER
from tests.golden.kinds import unpacked

STATE = "optimizer.state.module.module.module."
NAMES = ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.final_layernorm.weight")


def value_of(reader, name):
    spec = reader.specs[name]
    out = np.empty(spec.shape, spec.dtype)
    reader.read(name, spec.full_region, out)
    return out


def test_state_is_what_torch_reads_with_gated_projections_joined(tmp_path):
    root = unpacked("fsdp_dtensor", tmp_path)
    reader = open_megatron(LocalFolder(root))
    optimizer = open_optimizer(reader)
    assert optimizer.kind == "fsdp_dtensor"
    loaded = {
        key: torch.empty(reader.container.shape(key))
        for key in reader.container.tensor_names
        if key.startswith(STATE) and not key.endswith(".step")
    }
    dcp.load(loaded, checkpoint_id=root / "iter_0000003")
    for state in (EXP_AVG, EXP_AVG_SQ):
        moments = optimizer.states[state]
        assert moments.specs.keys() == reader.specs.keys()
        for name in moments.specs:
            halves = [f"{STATE}{name}_{half}.{state}" for half in "wv"] if "linear_fc1" in name else [f"{STATE}{name}.{state}"]
            expected = torch.cat([loaded[key] for key in halves]).numpy()
            assert value_of(moments, name).tobytes() == expected.tobytes()
            rows = slice(expected.shape[0] // 2 - 3, expected.shape[0] // 2 + 5)  # across the halves
            out = np.empty(expected[rows].shape, np.float32)
            moments.read(name, (rows, *moments.specs[name].full_region[1:]), out)
            assert out.tobytes() == expected[rows].tobytes()
    assert all(value_of(optimizer.states[MASTER], name).tobytes() == value_of(reader, name).tobytes() for name in reader.specs)
    reader.close()


def test_groups_are_those_of_the_weights_and_the_scheduler_is_part_of_the_common_state(tmp_path):
    reader = open_megatron(LocalFolder(unpacked("fsdp_dtensor", tmp_path)))
    ((decayed, plain),) = open_optimizer(reader).groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {(group["step"], group["lr"], group["betas"]) for group in (decayed, plain)} == {(3, 0.001, (0.9, 0.999))}
    twin = open_megatron(LocalFolder(unpacked("ranks_tp2_pp2_as_torch_dist", tmp_path)))
    assert [set(group) for group in open_optimizer(twin).groups[0]] == [set(decayed), set(plain)]
    assert reader.common_state()["opt_param_scheduler"]["max_lr"] == 0.01
    assert reader.common_state()["num_floating_point_operations_so_far"] > 0


def saved(folder, change=lambda _state: None):
    """A checkpoint of two weights, as torch saves it, after a change to its state."""
    keys = (f"{NAMES[0]}_w", f"{NAMES[0]}_v", NAMES[1])
    weights = {key: torch.randn(4, 6) if "fc1" in key else torch.randn(6) for key in keys}
    moments = {
        f"module.module.module.{key}": {"exp_avg": value / 2, "exp_avg_sq": value**2, "step": torch.tensor(3.0)}
        for key, value in weights.items()
    }
    meta = {"lr": 0.5, "weight_decay": 0.1, "is_expert_parallel": False}
    state = {
        "model": {f"module.{key}": value for key, value in weights.items()},
        "optimizer": {
            "state": moments,
            "param_to_group_meta": {f"module.module.module.{name}": {**meta, "wd_mult": 1.0} for name in NAMES},
        },
        "iteration": 3,
    }
    change(state["optimizer"])
    dcp.save(state, checkpoint_id=folder)
    return open_megatron(LocalFolder(folder))


def norm_of(optimizer, part="state"):
    return optimizer[part][f"module.module.module.{NAMES[1]}"]


DAMAGE = {
    "steps": (lambda o: norm_of(o).update(step=torch.tensor(2.0)), "`step` of the optimizer is 2 for some weights and 3 for"),
    "no_step": (lambda o: norm_of(o).pop("step"), f"the optimizer keeps no `step` of `{NAMES[1]}`"),
    "no_moment": (lambda o: norm_of(o).pop("exp_avg_sq"), f"`{NAMES[1]}` has `exp_avg` or `exp_avg_sq`, and not both"),
    "shape": (lambda o: norm_of(o).update(exp_avg=torch.zeros(5)), f"`exp_avg` of `{NAMES[1]}` has shape [5], the weight"),
    "muon": (lambda o: norm_of(o).update(momentum_buffer=torch.zeros(6)), "the optimizer keeps `momentum_buffer` of"),
    "no_meta": (lambda o: o["param_to_group_meta"].popitem(), f"`{NAMES[1]}` has optimizer state and no hyper-parameters"),
    "meta": (lambda o: norm_of(o, "param_to_group_meta").pop("lr"), "do not have the same hyper-parameters: `lr` is of"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_state_that_does_not_agree_is_named(tmp_path, case):
    change, message = DAMAGE[case]
    with pytest.raises(UserError) as error:
        open_optimizer(saved(tmp_path, change))
    assert message in str(error.value)


def test_weights_that_agree_are_a_group(tmp_path):
    assert [len(groups) for groups in open_optimizer(saved(tmp_path / "same")).groups] == [1]
    other = open_optimizer(saved(tmp_path / "other", lambda o: norm_of(o, "param_to_group_meta").update(weight_decay=0.0)))
    assert [sorted(group["weight_decay"] for group in groups) for groups in other.groups] == [[0.0, 0.1]]
    experts = open_optimizer(saved(tmp_path / "ep", lambda o: norm_of(o, "param_to_group_meta").update(is_expert_parallel=True)))
    assert [len(groups) for groups in experts.groups] == [1, 1]
