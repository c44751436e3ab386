"""`mbtrain show` and `mbtrain recipes`, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from trainer.cli import main


def mbtrain(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_show_prints_the_whole_run_and_what_follows_from_it() -> None:
    told = mbtrain("show", "llama32_1b", "train.train_iters=50")
    document = yaml.safe_load(told.stdout)
    assert (document["train"]["train_iters"], document["model"]["num_layers"]) == (50, 16)
    lines = told.stdout.splitlines()
    assert "# parameters: 1,235,814,400" in lines
    assert any(line.startswith("# memory of the fullest of 1 GPU, estimated: ") for line in lines)
    assert "# model.params_dtype = bfloat16: `mixed_precision=bf16_mixed`" in lines


def test_show_says_what_adapters_train_and_take() -> None:
    told = mbtrain("show", "llama3_8b", "peft=lora")
    lines = told.stdout.splitlines()
    trained = 32 * 32 * ((4096 + 6144) + (4096 + 4096) + (4096 + 28672) + (14336 + 4096))  # layers × r × (inputs + outputs)
    assert f"# trained: {trained / 1e6:.2f} M of {(trained + 8_030_261_248) / 1e9:.2f} B parameters" in lines
    assert f"#   adapters: 0.1 GB, {trained:,} parameters in bfloat16" in lines
    assert any(line.startswith("# memory of the fullest of 1 GPU, estimated: ") for line in lines)


def test_what_show_prints_is_a_run_that_shows_the_same(tmp_path: Path) -> None:
    once = mbtrain("show", "llama31_405b")
    (tmp_path / "run.yaml").write_text(once.stdout)
    again = mbtrain("show", "--config", tmp_path / "run.yaml", "--gpus", 512)
    assert again.exit_code == 0, again.stderr
    assert yaml.safe_load(again.stdout) == yaml.safe_load(once.stdout)


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
    lines = mbtrain("recipes").stdout.splitlines()
    assert [line.split()[:7] for line in lines] == [
        ["llama3_8b", "8.03B", "TP2", "bf16_mixed", "8", "4", "1"],
        ["llama3_70b", "70.55B", "TP8·PP4·VPP5", "bf16_mixed", "32", "32", "8"],
        ["llama31_8b", "8.03B", "TP2", "bf16_mixed", "8", "4", "1"],
        ["llama31_70b", "70.55B", "TP8·PP4·VPP5", "bf16_mixed", "32", "32", "8"],
        ["llama31_405b", "405.85B", "TP8·PP16·VPP2·CP4", "bf16_mixed", "512", "256", "32"],
        ["llama32_1b", "1.24B", "none", "bf16_mixed", "1", "1", "1"],
        ["llama32_3b", "3.21B", "none", "bf16_mixed", "4", "1", "1"],
        ["llama_tiny", "3.3M", "none", "fp32", "CPU", "CPU", "CPU"],
    ]


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
