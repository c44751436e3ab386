"""From a command line to a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import converter
from formats.errors import UserError
from trainer import recipes
from trainer.arguments import read_run, recipe_and_overrides
from trainer.config import FinetuningDatasetConfig
from trainer.peft import LoRA
from trainer.settings import yaml_io
from trainer.settings.resolve import resolve


def write(folder: Path, text: str) -> Path:
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


def test_overrides_win_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    file = write(tmp_path, "train: {train_iters: 5, micro_batch_size: 2}")
    train = read_run("llama_tiny", config_file=file, overrides=["train.train_iters=6"]).train
    assert (train.train_iters, train.micro_batch_size, train.global_batch_size) == (6, 2, 8)


def test_a_file_can_name_its_recipe(tmp_path: Path) -> None:
    config = read_run(None, config_file=write(tmp_path, "recipe: llama_tiny\nrng: {seed: 3}"))
    assert (config.model.num_layers, config.rng.seed) == (4, 3)


def test_a_dumped_run_needs_no_recipe(tmp_path: Path) -> None:
    config = recipes.find("llama31_405b").pretrain_config()
    assert read_run(None, config_file=write(tmp_path, yaml_io.dump(config))) == config


def test_two_recipes_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "recipe: llama3_8b")
    with pytest.raises(UserError) as refused:
        read_run("llama_tiny", config_file=file)
    assert str(refused.value) == (
        f"the command says recipe `llama_tiny`, and `{file}` says `llama3_8b`\n\nhint: leave out one of them"
    )


@pytest.mark.parametrize("text", ["train: {train_iters: 5}", "model:", "model: {hf_config: {}}"])
def test_a_run_has_to_start_from_something(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError) as refused:
        read_run(None, config_file=write(tmp_path, text))
    assert str(refused.value) == (
        "there is no recipe to start from\n\nhint: name one (`mbtrain recipes` lists them), or a folder with a model "
        "(`checkpoint.pretrained_checkpoint=DIR`), or a file with `recipe: NAME` or with `model.hf_config`"
    )


@pytest.mark.parametrize("form", ["huggingface", "megatron"])
def test_a_folder_that_says_what_model_it_holds_needs_no_recipe(form: str, model_folder: Any, tmp_path: Path) -> None:
    folder = Path(model_folder("gqa"))
    if form == "megatron":
        converter.hf_to_mcore(folder, tmp_path / "megatron", tp=1, pp=1)
    named = str(folder if form == "huggingface" else tmp_path / "megatron")
    override = f"checkpoint.pretrained_checkpoint={named}"
    file = write(tmp_path, f"checkpoint: {{pretrained_checkpoint: {named}}}")
    arguments: dict[str, Any] = {"overrides": [override, "train.train_iters=3"]}
    lora, every, more = (
        read_run(None, **arguments, finetune=True),
        read_run(None, overrides=[*arguments["overrides"], "peft=none"], finetune=True),
        read_run(None, config_file=file),
    )
    described = json.loads((folder / "config.json").read_text())
    for config in (lora, every, more):
        assert config.model.hf_config.items() >= {name: described[name] for name in ("hidden_size", "vocab_size")}.items()
        assert (config.dataset.sequence_length, config.checkpoint.pretrained_checkpoint) == (config.model.seq_length, named)
        resolve(config, world_size=1, device="cpu")
    assert (type(lora.peft), every.peft, more.peft) == (LoRA, None, None)
    assert [isinstance(run.dataset, FinetuningDatasetConfig) for run in (lora, every, more)] == [True, True, False]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_run("llama_tiny", config_file=tmp_path / "none.yaml")
    assert str(refused.value) == (f"cannot read `{tmp_path / 'none.yaml'}`: No such file or directory\n\nhint: give a YAML file")


def test_what_a_file_says_of_classes_is_told_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_run("llama_tiny", config_file=write(tmp_path, "train: {_target_: a.B}"))
    assert capsys.readouterr().err == "note: ignored, since a file holds values and no classes: train._target_\n"


@pytest.mark.parametrize(
    ("words", "recipe", "overrides"),
    [
        (["llama_tiny", "a.b=1"], "llama_tiny", ["a.b=1"]),
        (["a.b=1", "~c"], None, ["a.b=1", "~c"]),
        (["~c"], None, ["~c"]),
        (["+c.d=1"], None, ["+c.d=1"]),
        ([], None, []),
    ],
)
def test_the_first_word_is_the_recipe_unless_it_is_an_override(words: list, recipe: str | None, overrides: list) -> None:
    assert recipe_and_overrides(words) == (recipe, overrides)
