"""`inspect` says what each kind of Megatron checkpoint is, how it is laid out, and what it holds of a training run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner

from converter import inspect_checkpoint
from converter.cli import cli
from converter.training_state import TrainingState
from tests.golden.kinds import unpacked

LM = "Megatron-LM"
KINDS = {
    "zarr": ("Megatron zarr", LM, "0.2 to 0.15", "unknown", {"tp": 2, "pp": 2}),
    "zarr_distributed_optimizer": ("Megatron zarr", LM, "0.2 to 0.15", "unknown", {"tp": 2, "pp": 2}),
    "zarr_as_torch_dist": ("Megatron torch_dist", LM, "up to 0.18", "unknown", {"tp": 2, "pp": 2}),
    "torch_dcp": ("Megatron torch_dcp", LM, "", "llama", {"tp": 1, "pp": 1}),
    "torch_dcp_as_torch_dist": ("Megatron torch_dist", LM, "0.19 or later", "llama", {"tp": 1, "pp": 1}),
    "fsdp_dtensor": ("Megatron fsdp_dtensor", LM, "", "llama", {"tp": 2, "pp": 1}),
    "ranks_tp2_pp2": ("Megatron mp_rank files", LM, "", "llama", {"tp": 2, "pp": 2}),
    "ranks_pp2_vpp2": ("Megatron mp_rank files", LM, "", "llama", {"tp": 1, "pp": 2, "vpp": 2}),
    "ranks_ep2": ("Megatron mp_rank files", LM, "", "mixtral", {"tp": 1, "pp": 1, "ep": 2, "etp": 1}),
    "ranks_ep2_as_torch_dist": ("Megatron torch_dist", LM, "0.19 or later", "mixtral", {"tp": 1, "pp": 1, "ep": 2, "etp": 1}),
}  # fmt: skip
"""Format, writer, versions of megatron-core, family, layout. The `args` of zarr's do not say which norms the model has."""


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_named_with_its_layout_and_step(tmp_path, name):
    report = inspect_checkpoint(unpacked(name, tmp_path))
    assert (report.format, report.writer, report.versions, report.family, report.layout) == KINDS[name]
    step = 2 if name.startswith("zarr") else 3
    assert (report.state.iteration, report.iteration) == (step, f"iter_{step:07d}")
    assert report.state.scheduler
    assert report.state.random_numbers
    assert report.optimizer_state


@pytest.mark.parametrize(("name", "kind", "count"), [
    ("zarr", "plain", 15),
    ("zarr_distributed_optimizer", "fully_sharded_model_space", 15),
    ("torch_dcp_as_torch_dist", "plain", 15),
    ("ranks_tp2_pp2_as_torch_dist", "fully_reshardable", 15),
    ("ranks_ep2_as_torch_dist", "fully_reshardable", 29),
])  # fmt: skip
def test_the_optimizer_is_named_by_its_kind_with_what_it_keeps(tmp_path, name, kind, count):
    state = inspect_checkpoint(unpacked(name, tmp_path)).state
    step = 2 if name.startswith("zarr") else 3
    assert state == TrainingState(step, scheduler=True, random_numbers=True, optimizer=kind, masters=count, moments=count)


def test_the_command_prints_them_and_so_does_json(tmp_path):
    root = str(unpacked("ranks_tp2_pp2_as_torch_dist", tmp_path))
    lines = CliRunner().invoke(cli, ["inspect", root]).stdout.splitlines()
    for line in (
        "written by   Megatron-LM, megatron-core 0.19 or later",
        "layout       gpt, tp 2, pp 2",
        "optimizer    fully_reshardable: moments and fp32 masters of 15 of 15 weights",
        "state        step 3, scheduler, random numbers",
    ):
        assert line in lines
    report = json.loads(CliRunner().invoke(cli, ["inspect", root, "--json"]).stdout)
    assert report["versions"] == "0.19 or later"
    assert report["state"]["optimizer"] == "fully_reshardable"


def test_state_that_cannot_be_read_is_described_by_the_reason(tmp_path):
    iteration = unpacked("zarr", tmp_path) / "iter_0000002"
    common = torch.load(iteration / "common.pt", weights_only=False)
    del common["optimizer"]["optimizer"]["param_groups"]
    torch.save(common, iteration / "common.pt")
    state = inspect_checkpoint(iteration).state
    assert (state.optimizer, state.masters) == ("", 0)
    assert state.not_read == "the checkpoint's optimizer has no `param_groups`"
    assert "optimizer    yes, not read: the checkpoint's opt" in CliRunner().invoke(cli, ["inspect", str(iteration)]).stdout


def test_what_a_checkpoint_lacks_is_not_said(tmp_path):
    root = unpacked("ranks_tp2_pp2", tmp_path)
    for file in root.glob("iter_*/mp_rank_*/*.pt"):
        if file.name != "model_optim_rng.pt":
            file.unlink()
            continue
        state = torch.load(file, weights_only=False)
        torch.save({name: state[name] for name in ("model", "checkpoint_version")}, file)
    report = inspect_checkpoint(root)
    assert (report.writer, report.versions, report.family) == ("a script, without `args`", "", "unknown")
    assert report.state == TrainingState(None, scheduler=False, random_numbers=False)
    lines = CliRunner().invoke(cli, ["inspect", str(root)]).stdout.splitlines()
    assert "optimizer    no" in lines
    assert "state        none" in lines


def test_the_format_written_here_needs_no_version(tmp_path):
    root = unpacked("ranks_tp2_pp2_as_torch_dist", tmp_path)
    (root / "iter_0000003" / "conversion.json").write_text("{}")
    report = inspect_checkpoint(root)
    assert (report.writer, report.versions) == ("mbconvert", "")
    shutil.rmtree(root)
