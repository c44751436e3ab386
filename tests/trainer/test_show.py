"""`mbtrain show` and `mbtrain recipes`, as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from trainer import recipes
from trainer.arguments import read_run
from trainer.cli import main
from trainer.settings.kernels import KERNELS


def mbtrain(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_show_prints_the_whole_run_and_what_follows_from_it() -> None:
    result = mbtrain("show", "llama32_1b", "train.train_iters=50", "--all")
    document = yaml.safe_load(result.stdout)
    assert (document["train"]["train_iters"], document["model"]["num_layers"]) == (50, 16)
    lines = result.stdout.splitlines()
    assert "# parameters: 1,235,814,400" in lines
    assert any(line.startswith("# memory of the fullest of 1 GPU, estimated: ") for line in lines)
    assert "# model.params_dtype = bfloat16: `mixed_precision=bf16_mixed`" in lines


def test_show_says_what_adapters_train_and_take() -> None:
    result = mbtrain("show", "llama3_8b", "peft=lora")
    lines = result.stdout.splitlines()
    trained = 32 * 32 * ((4096 + 6144) + (4096 + 4096) + (4096 + 28672) + (14336 + 4096))  # layers × r × (inputs + outputs)
    assert f"# trained: {trained / 1e6:.3g} M of {(trained + 8_030_261_248) / 1e9:.3g} B parameters" in lines
    assert f"#   adapters: 0.1 GB, {trained:,} parameters in bfloat16" in lines
    assert any(line.startswith("# memory of the fullest of 1 GPU, estimated: ") for line in lines)


RUNS = [
    ["llama3_70b", "--gpus", "32"],
    ["llama3_8b", "peft=dora", "peft.dim=8", "optimizer.weight_decay=0.01", "--gpus", "1"],
    ["llama3_8b", "peft=none", "dataset.path=chat.jsonl", "model.num_layers=4", "--gpus", "2"],
    ["llama_tiny", "train.train_iters=7", "+model.hf_config.note=mine", "--nproc", "2"],
]


@pytest.mark.parametrize("every", [[], ["--all"]])
@pytest.mark.parametrize("words", RUNS, ids=lambda words: " ".join(words[:2]))
def test_what_show_prints_is_a_run_that_shows_the_same(words: list[str], every: list[str], tmp_path: Path) -> None:
    once = mbtrain("show", *words, *every)
    (tmp_path / "run.yaml").write_text(once.stdout)
    again = mbtrain("show", "--config", tmp_path / "run.yaml", *words[-2:], *every)
    assert again.exit_code == 0, again.stderr
    assert yaml.safe_load(again.stdout) == yaml.safe_load(once.stdout)
    resolved = [
        mbtrain("show", *start, *words[-2:], "--all").stdout for start in (words[:-2], ["--config", tmp_path / "run.yaml"])
    ]
    assert yaml.safe_load(resolved[0]) == yaml.safe_load(resolved[1])


def test_what_show_prints_pins_nothing_that_nobody_chose(tmp_path: Path) -> None:
    """A laptop has no fused kernels. The machine with GPUs that is given the file has."""
    result = mbtrain("show", "llama32_1b", "train.micro_batch_size=2")
    (tmp_path / "run.yaml").write_text(result.stdout)
    model = read_run(None, config_file=tmp_path / "run.yaml").model
    assert {name: getattr(model, name) for name in KERNELS} == dict.fromkeys(KERNELS)
    document = yaml.safe_load(result.stdout)
    assert (document["recipe"], document["train"]["micro_batch_size"]) == ("llama32_1b", 2)
    assert "model" not in document
    assert len(result.stdout.splitlines()) < 60
    assert "is set in Python code" not in mbtrain("show", "llama32_1b", "--all").stdout


def test_show_builds_a_mixture_of_experts() -> None:
    experts = ("num_moe_experts=8", "moe_ffn_hidden_size=64", "expert_model_parallel_size=2")
    result = mbtrain("show", "llama_tiny", "~model.hf_config", *(f"model.{setting}" for setting in experts), "--nproc", "2")
    attention, embedding = 256 * (256 + 2 * 128) + 256 * 256, 2 * 257 * 256 + 256
    layer = attention + 2 * 256 + 8 * 256 + 8 * 3 * 256 * 64
    assert f"# parameters: {embedding + 4 * layer:,}" in result.stdout.splitlines(), result.stderr or result.exception
    sizes = [
        line for line in result.stdout.splitlines() if line.startswith(("# memory of the fullest", "# the same if all tokens"))
    ]
    even, uneven = (float(line.rpartition(": ")[2].split()[0]) for line in sizes)
    assert uneven > even
    assert "of one rank" not in mbtrain("show", "llama_tiny").stdout


@pytest.mark.parametrize(
    ("words", "machine"),
    [
        (["llama_tiny"], "1 process"),
        (["llama_tiny", "--nproc", "2"], "2 processes"),
        (["llama3_8b", "--gpus", "16"], "16 GPUs"),
        (["llama3_8b", "model.tensor_model_parallel_size=8", "model.context_parallel_size=2"], "16 GPUs"),
    ],
)
def test_show_counts_for_the_machine_it_is_told(words: list[str], machine: str) -> None:
    assert f"# memory of the fullest of {machine}, estimated: " in mbtrain("show", *words).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama_tinny"], "error: there is no recipe `llama_tinny`\n\nhint: did you mean `llama_tiny`?\n"),
        (["llama_tiny", "lr=1"], "error: unknown setting `lr`\n\nhint: did you mean `optimizer.lr`?\n"),
        (
            ["llama_tiny", "--gpus", "1", "--nproc", "1"],
            "error: `--gpus` and `--nproc` are both given\n\nhint: give one of them\n",
        ),
    ],
)
def test_show_refuses_what_a_run_would_refuse(words: list[str], message: str) -> None:
    refused = mbtrain("show", *words)
    assert (refused.exit_code, refused.stdout, refused.stderr) == (1, "", message)


def test_recipes_are_listed_a_line_each() -> None:
    lines = mbtrain("recipes", "llama").stdout.splitlines()
    assert lines[0].split() == ["recipe", "size", "parallelism", "precision", "GPUs", "SFT", "PEFT", "what", "it", "is"]
    assert [line.split()[:7] for line in lines[1:]] == [
        ["llama3_8b", "8.03B", "TP2", "bf16_mixed", "8", "4", "1"],
        ["llama3_70b", "70.55B", "TP8·PP4·VPP5", "bf16_mixed", "32", "32", "8"],
        ["llama31_8b", "8.03B", "TP2", "bf16_mixed", "8", "4", "1"],
        ["llama31_70b", "70.55B", "TP8·PP4·VPP5", "bf16_mixed", "32", "32", "8"],
        ["llama31_405b", "405.85B", "TP8·PP16·VPP2·CP4", "bf16_mixed", "512", "256", "32"],
        ["llama32_1b", "1.24B", "none", "bf16_mixed", "1", "1", "1"],
        ["llama32_3b", "3.21B", "none", "bf16_mixed", "4", "1", "1"],
        ["llama_tiny", "3.3M", "none", "fp32", "CPU", "CPU", "CPU"],
    ]


def test_every_recipe_is_listed_once_beside_its_family() -> None:
    names = [line.split()[0] for line in mbtrain("recipes").stdout.splitlines()[1:]]
    assert names == [*recipes.every()]
    families = [family for family, _ in groupby(names, lambda name: name.partition("_")[0])]
    assert len(families) == len({*families}) > 5
    assert mbtrain("recipes", "qwen9").stderr == "error: there is no recipe `qwen9`\n\nhint: did you mean `qwen3_8b`?\n"


def test_help_and_recipes_need_no_torch() -> None:
    """Nor anything else that takes seconds; in a program of its own, since this one has imported them."""
    listed = (
        "import sys; from click.testing import CliRunner; from trainer.cli import main\n"
        "for words in (['--help'], ['show', '--help'], ['recipes'], ['recipes', '--json']):\n"
        "    assert CliRunner().invoke(main, words).exit_code == 0, words\n"
        "print(*{'torch', 'megatron', 'transformers', 'pyarrow', 'hydra'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    assert result.stdout == "\n"


@pytest.mark.parametrize("name", recipes.every())
def test_a_recipe_is_listed_as_what_it_makes(name: str) -> None:
    recipe = recipes.find(name)
    config = recipe.pretrain_config()
    assert (config.model.hf_config, config.mixed_precision) == (recipe.model, recipe.precision)
    assert {field: getattr(config.model, field) for field in recipe.layout} == recipe.layout


def test_recipes_as_json_are_one_object() -> None:
    assert json.loads(mbtrain("recipes", "--json").stdout)["llama_tiny"] == {
        "parameters": 3_279_616,
        "parallelism": "none",
        "precision": "fp32",
        "gpus": 0,
        "sft_gpus": 0,
        "peft_gpus": 0,
        "summary": "A Llama of 3 million parameters over bytes, in fp32, on a CPU in about a minute.",
    }
