"""Experts divided among ranks: by the command line and Python alike, as a checkpoint says it, and read back from any layout."""

from __future__ import annotations

import json

import pytest
import yaml

from converter import UserError, hf_to_mcore, mcore_to_hf
from converter import inspect_checkpoint as inspect
from converter import verify_checkpoints as verify
from tests.converter.family_suite import save_small
from tests.converter.test_cli import mbconvert
from tests.models import model_tree, tree
from tests.refusal import refused

LAYOUT = {"tp": 2, "pp": 2, "ep": 4, "etp": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Mixtral: 4 experts of 96 channels in each of 4 layers."""
    return save_small("mixtral", tmp_path_factory.mktemp("mixtral") / "hf")


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("megatron") / "m"
    hf_to_mcore(folder, root, **LAYOUT)
    return root


@pytest.mark.parametrize("names", [
    ["--tp", "--pp", "--ep", "--etp"],
    ["--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--expert-model-parallel-size",
     "--expert-tensor-parallel-size"],
])  # fmt: skip
def test_the_command_line_gives_the_same_bytes(folder, checkpoint, tmp_path, names):
    sizes = [word for pair in zip(names, LAYOUT.values(), strict=True) for word in pair]
    done = mbconvert("hf-to-mcore", folder, tmp_path / "m", *sizes, "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path / "m") == tree(checkpoint)


def test_what_is_written_says_its_layout(checkpoint):
    iteration = checkpoint / "iter_0000000"
    options = json.loads((iteration / "conversion.json").read_text())["options"]
    assert {name: options[name] for name in LAYOUT} == LAYOUT
    model = yaml.safe_load((iteration / "run_config.yaml").read_text())["model"]
    assert (model["expert_model_parallel_size"], model["expert_tensor_parallel_size"]) == (4, 1)
    assert inspect(checkpoint).layout == LAYOUT
    assert "layout       gpt, tp 2, pp 2, ep 4, etp 1\n" in mbconvert("inspect", checkpoint).stdout


def test_an_expert_is_divided_as_other_layers_are_unless_said_otherwise(folder, tmp_path):
    hf_to_mcore(folder, tmp_path / "m", tp=2, ep=2)
    assert inspect(tmp_path / "m").layout == {"tp": 2, "pp": 1, "ep": 2, "etp": 2}


def test_an_expert_with_biases_is_not_divided_unless_said(tmp_path):
    folder = save_small("gpt_oss", tmp_path / "hf")
    for etp in (None, 2):
        hf_to_mcore(folder, tmp_path / f"m{etp}", tp=2, ep=2, etp=etp)
        assert inspect(tmp_path / f"m{etp}").layout == {"tp": 2, "pp": 1, "ep": 2, "etp": etp or 1}
    assert verify(tmp_path / "mNone", tmp_path / "m2").same


def test_a_dry_run_says_the_layout_and_a_file_for_each_rank(folder, checkpoint):
    sizes = ["--tp", 2, "--pp", 2, "--ep", 4, "--etp", 1]
    summary = json.loads(mbconvert("hf-to-mcore", folder, "none", *sizes, "--dry-run", "--json").stdout)
    assert summary["layout"] == {"tp": 2, "pp": 2, "vpp": 1, "ep": 4, "etp": 1}
    files = [f"iter_0000000/__{rank}_0.distcp" for rank in range(8)]
    assert [name for name in summary["files"] if name.endswith(".distcp")] == files
    shown = mbconvert("hf-to-mcore", folder, "none", *sizes, "--dry-run").stdout
    assert "weights in 8 files, one for each rank that holds some: tp 2, pp 2, vpp 1, ep 4, etp 1\n" in shown


@pytest.mark.parametrize("other", [{}, {"ep": 2, "etp": 3}, {"tp": 4, "pp": 4, "ep": 1}, {"tp": 2, "etp": 1}], ids=str)
def test_any_layout_holds_the_same_weights(folder, checkpoint, tmp_path, other):
    hf_to_mcore(folder, tmp_path / "m", **other)
    assert verify(checkpoint, tmp_path / "m").same
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(folder)


@pytest.mark.parametrize(("layout", "message", "hint"), [
    ({"ep": 3}, "expert-parallel size 3 does not divide the model's 4 experts", "`--ep` may be 1, 2, 4"),
    ({"etp": 5}, "expert-tensor-parallel size 5 does not divide the experts' feed-forward size, 96", "choose a divisor"),
])  # fmt: skip
def test_sizes_that_do_not_divide_are_refused(folder, tmp_path, layout, message, hint):
    with pytest.raises(UserError, match=f"^{message}") as error:
        hf_to_mcore(folder, tmp_path / "m", **layout)
    assert hint in error.value.hint


def test_tensor_parallelism_that_experts_cannot_follow_is_refused_with_what_to_do(tmp_path):
    folder = save_small("mixtral", tmp_path / "hf", intermediate_size=98)
    message = "expert-tensor-parallel size 4, which `--tp` is unless `--etp` is given, does not divide .*, 98"
    refused(hf_to_mcore, folder, tmp_path, message, tp=4)
    hf_to_mcore(folder, tmp_path / "m", tp=4, etp=1)
    assert verify(folder, tmp_path / "m").same


@pytest.mark.parametrize(("name", "what"), [("ep", "expert-parallel"), ("etp", "expert-tensor-parallel")])
def test_a_dense_model_has_no_experts_to_divide(model_folder, tmp_path, name, what):
    done = mbconvert("hf-to-mcore", model_folder(), tmp_path / "m", f"--{name}", 2)
    assert done.returncode == 1
    assert done.stderr == f"error: {what} size 2 needs a model with experts, which this is not\n\nhint: leave `--{name}` out\n"
    hf_to_mcore(model_folder(), tmp_path / "m", tp=2, **{name: 1})
    assert inspect(tmp_path / "m").layout == {"tp": 2, "pp": 1}
