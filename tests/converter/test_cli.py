"""The command line: exit codes, what goes to stdout and what to stderr, and that nothing imports torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from benchmarks.convert import SHAPES, make_model
from converter import families, hf_to_mcore, mcore_to_hf
from tests.converter.adapters.made import save_adapter

GUARD = """
import runpy, sys
sys.argv = ["mbconvert", *sys.argv[1:]]
try:
    runpy.run_module("converter", run_name="__main__")
except SystemExit as stop:
    code = stop.code
else:
    code = 0
heavy = sorted({"torch", "megatron", "transformers", "safetensors"} & {name.partition(".")[0] for name in sys.modules})
sys.exit(f"imported {heavy}" if heavy else code)
"""


def mbconvert(*arguments, cwd=None):
    """Run a command in its own process; it fails if torch, megatron-core or transformers got imported."""
    command = [sys.executable, "-c", GUARD, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture
def folder(model_folder):
    return model_folder("gqa", dtype="bfloat16")


@pytest.fixture
def peft_adapter(folder, tmp_path):
    return save_adapter(folder, tmp_path / "adapter", equal_a=True)


def test_no_command_imports_torch(folder, tmp_path):
    megatron, back = tmp_path / "m", tmp_path / "back"
    for command in (
        ["--help"], ["--version"], ["families"], ["families", "--json"],
        ["hf-to-mcore", folder, megatron, "--tp", 2, "--pp", 2, "--dtype", "fp32"],
        ["hf-to-mcore", folder, tmp_path / "x", "--dry-run"], ["inspect", folder], ["inspect", megatron, "--tensors"],
        ["mcore-to-hf", megatron, back], ["mcore-to-hf", megatron, tmp_path / "x", "--dry-run", "--max-shard-size", "50KB"],
        ["reshard", megatron, tmp_path / "r", "--tp", 4, "--verify"],
    ):  # fmt: skip
        done = mbconvert(*command)
        assert done.returncode == 0, (command, done.stderr)


def test_no_command_on_adapters_imports_torch(folder, peft_adapter, tmp_path):
    megatron, back = tmp_path / "m", tmp_path / "back"
    for command in (
        ["adapter-to-mcore", peft_adapter, megatron, "--base", folder, "--verify"],
        ["adapter-to-mcore", peft_adapter, tmp_path / "x", "--base", folder, "--fused", "--dry-run"],
        ["adapter-to-hf", megatron, back, "--json"], ["adapter-to-hf", megatron, tmp_path / "x", "--dry-run"],
    ):  # fmt: skip
        done = mbconvert(*command)
        assert done.returncode == 0, (command, done.stderr)


def test_results_go_to_stdout_and_progress_to_stderr(folder, tmp_path):
    done = mbconvert("hf-to-mcore", folder, tmp_path / "m")
    assert done.stdout == ""
    assert "done: 27 tensors, " in done.stderr
    assert "peak memory" in done.stderr
    done = mbconvert("hf-to-mcore", folder, tmp_path / "m2", "-q")
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    ("arguments", "former", "present"),
    [
        (["verify", "a", "b", "--as", "bf16"], "--as", "--cast-to"),
        (["merge", "a", "b", "c", "--any-base"], "--any-base", "--allow-other-base"),
        (["hf-to-mcore", "a", "b", "--vocab-divisible-by", "4"], "--vocab-divisible-by", "--make-vocab-size-divisible-by"),
        (["merge", "a", "b", "c", "--vocab-divisible-by=4"], "--vocab-divisible-by", "--make-vocab-size-divisible-by"),
    ],
)  # fmt: skip
def test_the_former_name_of_an_option_is_answered_with_its_present_name(arguments, former, present):
    done = mbconvert(*arguments, "--json")
    assert done.returncode == 2
    assert done.stderr.endswith(f"Error: there is no option `{former}`; write `{present}`\n")
    assert json.loads(done.stdout)["error"] == f"there is no option `{former}`; write `{present}`"


def test_a_name_is_not_suggested_to_a_command_without_that_option():
    done = mbconvert("inspect", "a", "--as", "bf16")
    assert done.returncode == 2
    assert "--cast-to" not in done.stderr


def test_megatrons_names_and_notation_give_the_same_bytes(folder, tmp_path):
    hf_to_mcore(folder, tmp_path / "short", tp=2, pp=2, vpp=2, pp_layout=[1, 1, 2, 0], make_vocab_size_divisible_by=64)
    done = mbconvert(
        "hf-to-mcore", folder, tmp_path / "long", "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2,
        "--vpp", 2, "--pp-layout", "Et|t|(t)*2|L", "--make-vocab-size-divisible-by", 64, "-q",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    hf_to_mcore(folder, tmp_path / "python", tp=2, pp=2, vpp=2, pp_layout="Et|t|tt|L", make_vocab_size_divisible_by=64)
    short, long, python = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("short", "long", "python")
    )
    assert short == long == python


def test_a_layout_of_other_sizes_is_refused_with_both_numbers(folder, tmp_path):
    done = mbconvert("hf-to-mcore", folder, tmp_path / "m", "--pp", 2, "--pp-layout", "Et|t|t|tL")
    assert done.returncode == 1
    assert "`--pp-layout 1,1,1,1` has 4 stages and 4 layers; 2 pipeline ranks × 1 virtual stages need 2" in done.stderr


def test_json_prints_one_object(folder, tmp_path):
    done = mbconvert("hf-to-mcore", folder, tmp_path / "m", "--json", "--tp", "2")
    summary = json.loads(done.stdout)
    on_disk = {p.relative_to(tmp_path / "m").as_posix(): p.stat().st_size for p in (tmp_path / "m").rglob("*") if p.is_file()}
    assert summary["files"] == on_disk
    assert summary["total_bytes"] == sum(on_disk.values())
    assert summary["tensors"] == 27
    assert json.loads(mbconvert("inspect", tmp_path / "m", "--json").stdout)["layout"] == {"tp": 2, "pp": 1}


def test_a_dry_run_tells_every_file_and_moves_nothing(folder, tmp_path):
    plan = json.loads(mbconvert("hf-to-mcore", folder, tmp_path / "m", "--tp", 2, "--pp", 2, "--dry-run", "--json").stdout)
    assert not list(tmp_path.iterdir())
    hf_to_mcore(folder, tmp_path / "m", tp=2, pp=2)
    written = {p.relative_to(tmp_path / "m").as_posix(): p.stat().st_size for p in (tmp_path / "m").rglob("*") if p.is_file()}
    assert plan["files"] == written
    back = json.loads(mbconvert("mcore-to-hf", tmp_path / "m", tmp_path / "b", "--dry-run", "--json").stdout)
    record = back["files"].pop("conversion.json")
    mcore_to_hf(tmp_path / "m", tmp_path / "b")
    assert record == (tmp_path / "b" / "conversion.json").stat().st_size
    shutil.rmtree(tmp_path / "b")
    assert back["files"] == {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    text = mbconvert("mcore-to-hf", tmp_path / "m", tmp_path / "b", "--dry-run").stdout
    assert "expected peak memory" in text
    assert "free disk" in text


def test_a_405b_model_is_planned_from_headers_alone(tmp_path):
    """Its files are holes of the right size. (How long it takes is the benchmark's to say.)"""
    make_model(tmp_path / "405b", SHAPES["405b"], data=False)
    done = mbconvert("hf-to-mcore", tmp_path / "405b", tmp_path / "m", "--tp", 8, "--pp", 16, "--pp-layout",
                     ",".join(["8"] * 15 + ["6"]), "--dry-run", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert 405e9 < summary["parameters"] < 410e9
    assert sum(name.endswith(".distcp") for name in summary["files"]) == 128
    assert summary["total_bytes"] > 2 * summary["parameters"]


@pytest.mark.parametrize("arguments", [
    ["convert"], ["hf-to-mcore", "a"], ["hf-to-mcore", "a", "b", "--tp", "0"], ["hf-to-mcore", "a", "b", "--dtype", "int8"],
    ["mcore-to-hf", "a", "b", "--max-shard-size", "5 apples"], ["mcore-to-hf", "a", "b", "--max-shard-size", "9" * 400],
    ["mcore-to-hf", "a", "b", "--max-shard-size", "5000000TB"], ["hf-to-mcore", "a", "b", "--pp-layout", "3,x"],
    ["hf-to-mcore", "a", "b", "--pp-layout", "Et|x|L"], ["inspect"],
    ["inspect", "a", "--check", "--tensors"],
])  # fmt: skip
def test_misuse_exits_with_2(arguments):
    done = mbconvert(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Error: " in done.stderr


def test_failure_exits_with_1_and_a_hint_and_no_traceback(folder, tmp_path):
    done = mbconvert("hf-to-mcore", folder, tmp_path / "m", "--tp", "3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: tensor-parallel size 3 neither divides the model's 4 query groups nor is a multiple of them\n"
        "\n"
        "hint: megatron-core takes 1, 2, 4 or a multiple of 4\n"
    )


def test_a_failure_is_one_json_object_too(folder, tmp_path):
    done = mbconvert("hf-to-mcore", folder, tmp_path / "m", "--tp", "3", "--json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: tensor-parallel size 3 neither")
    assert json.loads(done.stdout) == {
        "error": "tensor-parallel size 3 neither divides the model's 4 query groups nor is a multiple of them",
        "hint": "megatron-core takes 1, 2, 4 or a multiple of 4",
    }
    done = mbconvert("hf-to-mcore", folder, tmp_path / "m", "--tp", "0", "--json")
    assert done.returncode == 2
    assert sorted(json.loads(done.stdout)) == ["error", "hint"]


def test_an_interrupt_exits_with_130_and_leaves_nothing(folder, tmp_path):
    script = GUARD.replace(
        "import runpy, sys",
        "import runpy, sys, converter.worker\ndef stop(*a, **k): raise KeyboardInterrupt\nconverter.worker.run = stop",
    )
    command = [sys.executable, "-c", script, "hf-to-mcore", str(folder), str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert not list(tmp_path.iterdir())


def test_families_lists_the_directory():
    listed = mbconvert("families").stdout.partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in listed] == families.names()
    columns = [re.split("  +", line) for line in listed]
    assert columns == [
        [name, family.ARCHITECTURE, "weights, trains" if family.trains else "weights", family.MODELS]
        for name, family in ((name, families.find(name)) for name in families.names())
    ]
    assert len({len(line) - len(words[3]) for line, words in zip(listed, columns, strict=True)}) == 1


def test_notes_on_casts_zero_biases_and_rope(model_folder, tmp_path):
    done = mbconvert("hf-to-mcore", model_folder("attention_bias"), tmp_path / "m", "--dtype", "bf16")
    assert "note: weights are cast from fp32 to bf16" in done.stderr
    assert "note: 8 biases that the source does not have are written as zeros" in done.stderr
    done = mbconvert("hf-to-mcore", model_folder("rope_other_numbers"), tmp_path / "n")
    assert "set `rotary_pos_emb.inv_freq` after building the model" in done.stderr
    done = mbconvert("hf-to-mcore", model_folder("rope31"), tmp_path / "o")
    assert "note:" not in done.stderr


def test_the_command_line_surface_is_frozen():
    """An option that changes name or goes breaks people's scripts: change this on purpose."""
    from converter.cli import cli

    surface = {name: sorted(o for p in command.params for o in p.opts) for name, command in cli.commands.items()}
    both = ["--dry-run", "--json", "--overwrite", "--quiet", "--resume", "--verify", "--workers", "-q", "source", "target"]
    layout = ["--layout", "--tp", "--tensor-model-parallel-size", "--pp", "--pipeline-model-parallel-size", "--vpp",
              "--pp-layout", "--ep", "--expert-model-parallel-size", "--etp", "--expert-tensor-parallel-size",
              "--make-vocab-size-divisible-by"]  # fmt: skip
    weights = ["--dtype", "--integrity"]
    assert surface == {
        "hf-to-mcore": sorted([*both, "--ckpt-format", "--hf-config", "--transformer-impl", *layout, *weights]),
        "mcore-to-hf": sorted([*both, "--from", "--hf-config", "--max-shard-size", "--quantize", *weights]),
        "reshard": sorted([*both, *layout, *weights, "--from", "--hf-config", "--weights-only"]),
        "average": sorted([*both[:-2], "sources", "target", "--weights", "--from", "--hf-config", "--integrity"]),
        "extend-vocab": sorted([*both, "--to", "--init", "--hf-config", "--weights-only", "--integrity"]),
        "adapter-to-mcore": sorted([*both, "--base", "--canonical", "--layout"]),
        "adapter-to-hf": sorted([*both, "--experts"]),
        "merge": sorted(
            [
                *(set(both) - {"source"}),
                *layout,
                *weights,
                "--max-shard-size",
                "--hf-config",
                "--to",
                "--allow-other-base",
                "base",
                "adapter",
            ]
        ),
        "inspect": ["--check", "--json", "--tensors", "path"],
        "verify": ["--cast-to", "--json", "--quiet", "--workers", "-q", "one", "other"],
        "families": ["--all", "--json"],
    }
