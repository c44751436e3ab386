"""`~` at the beginning of a path is the home directory, wherever a path is read: shells leave it in quotes and after a `=`."""

from __future__ import annotations

import pwd
import shutil
from pathlib import Path

import pytest

from formats.errors import UserError
from formats.home import expanded


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory, and another one to be in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_what_begins_with_it_is_in_the_home_directory(home):
    assert expanded("~") == str(home)
    assert expanded("~/a b/ü") == f"{home}/a b/ü"
    assert expanded(Path("~/a")) == f"{home}/a"
    assert expanded("~root/a") == f"{pwd.getpwnam('root').pw_dir}/a"
    for other in ("./~/a", "a/~", "a~", "/~", "s3://~/a", "hf://org/~name", ""):
        assert expanded(other) == other


def test_a_user_that_there_is_not_is_named(home):
    with pytest.raises(UserError) as refused:
        expanded("~no-one-of-us/a")
    assert str(refused.value) == (
        "`~no-one-of-us/a` is in the home directory of user `no-one-of-us`, which does not exist\n\n"
        "hint: give the full path, or `./~no-one-of-us/a` for a folder named `~no-one-of-us`"
    )


def test_conversions_read_and_write_there(home, model_folder):
    from converter import check, hf_to_mcore, inspect, mcore_to_hf, verify

    shutil.copytree(model_folder("gqa"), home / "model")
    hf_to_mcore("~/model", "~/mcore")
    mcore_to_hf(Path("~/mcore"), Path("~/back"), hf_config="~/model")
    assert verify("~/model", "~/back").same
    assert inspect("~/mcore").tensors
    assert check("~/mcore").whole
    assert {path.name for path in home.iterdir()} == {"model", "mcore", "back"}
    assert not list(Path.cwd().iterdir())


def test_every_path_of_a_run_is_there_by_its_type(home):
    from tests.trainer.settings import settings
    from trainer.config import FinetuningDatasetConfig
    from trainer.settings.resolve import resolve

    paths = {
        "checkpoint": ("save", "load", "pretrained_checkpoint", "pretrained_adapter"),
        "logger": ("run_dir", "tensorboard_dir", "wandb_save_dir"),
        "tokenizer": ("tokenizer_model",),
        "model": ("hf_source", "pretrained_from"),
        "dataset": ("path", "validation_path", "test_path", "chat_template", "path_to_cache"),
    }
    config = settings(dataset=FinetuningDatasetConfig(sequence_length=128))
    for section, names in paths.items():
        for name in names:
            setattr(getattr(config, section), name, f"~/{name}")
    config.logger.wandb_exp_name = "~/no path"
    config.mixed_precision = "fp32"
    resolved = resolve(config, world_size=1, device="cpu").config
    for section, names in paths.items():
        assert {name: getattr(getattr(resolved, section), name) for name in names} == {name: f"{home}/{name}" for name in names}
    assert resolved.logger.wandb_exp_name == "~/no path"
    assert config.checkpoint.save == "~/save"  # what was given stays


def test_settings_that_are_paths_say_so():
    """By name nobody would forget a new one: what is called as paths are has a path's type."""
    import re

    from tests.trainer.settings import settings
    from trainer.config import DatasetConfig, FinetuningDatasetConfig
    from trainer.settings.fields import every_name

    not_paths = ("prompt_template", "use_mamba_mem_eff_path", "config_logger_dir")  # a run refuses the last
    known = {"checkpoint.save", "checkpoint.load", "checkpoint.pretrained_checkpoint", "checkpoint.pretrained_adapter"}
    looks = re.compile(r"(path|_dir|_file|_folder|_template|path_to_cache|tokenizer_model|hf_source|pretrained_from)$")
    for dataset in (DatasetConfig(), FinetuningDatasetConfig()):
        config = settings(dataset=dataset)
        for name in (setting for setting in every_name(config) if looks.search(setting) or setting in known):
            section, _, key = name.partition(".")
            kind = str(type(getattr(config, section)).__dataclass_fields__[key].type)
            assert "FilePath" in kind or key in not_paths, name


@pytest.mark.parametrize("text", ["checkpoint.save=~/out", "checkpoint.save='~/out'", 'checkpoint.save="~/out"'])
def test_the_command_line_of_a_run_has_it_too(home, text):
    from trainer.arguments import read_run

    assert read_run("llama_tiny", overrides=[text]).checkpoint.save == f"{home}/out"
    mixed = ["dataset.blend=[0.3,~/a,0.7,b]"]
    assert read_run("llama_tiny", overrides=mixed).dataset.blend == [0.3, f"{home}/a", 0.7, "b"]


def test_a_file_of_settings_has_it_too(home):
    from trainer.arguments import read_run

    (home / "run.yaml").write_text("checkpoint:\n  save: ~/out\n")
    assert read_run("llama_tiny", config_file="~/run.yaml").checkpoint.save == f"{home}/out"


def test_other_commands_have_it_too(home):
    from click.testing import CliRunner

    from trainer.arguments import recipe_and_overrides
    from trainer.commands.pack import _split_words
    from trainer.commands.prepare_data import command

    (home / "a.txt").write_text("some text")
    done = CliRunner().invoke(command, ["~/a.txt", "~/tokens", "--tokenizer=byte", "--workers=1"], catch_exceptions=False)
    assert done.exit_code == 0
    assert {path.name for path in home.iterdir()} == {"a.txt", "tokens.bin", "tokens.idx"}
    assert _split_words(("~/out", "~model.hf_config", "a=~/b")) == (None, home / "out", ["~model.hf_config", "a=~/b"])
    assert recipe_and_overrides(["~model.hf_config"]) == (None, ["~model.hf_config"])


def as_the_hub_keeps_it(model: Path, cache: Path) -> Path:
    """A snapshot in the Hub's cache: links to blobs that are called by their hashes. The names have spaces and letters."""
    import hashlib

    snapshot = cache / "models--größe--ein modell" / "snapshots" / "0123abc"
    blobs = snapshot.parents[1] / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for path in (file for file in model.rglob("*") if file.is_file()):
        blob = blobs / hashlib.sha256(str(path).encode()).hexdigest()
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(model)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(blob.relative_to(link.parent, walk_up=True))
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_a_model_like_any(home, model_folder):
    from converter import hf_to_mcore, mcore_to_hf, verify
    from trainer import tokenizers
    from trainer.checkpoints.contents import describe, tokenizer_of

    snapshot = as_the_hub_keeps_it(model_folder("gqa"), home / "~ cache ü")
    hf_to_mcore(snapshot, home / "ein modell ü")
    mcore_to_hf(home / "ein modell ü", "zurück #1")
    assert verify(snapshot, "zurück #1").same
    assert {path.name for path in Path("zurück #1").iterdir()} >= {path.name for path in snapshot.iterdir()}
    assert not any(path.is_symlink() for path in Path("zurück #1").iterdir())
    assert describe(str(snapshot)).config == describe("zurück #1").config
    assert tokenizer_of(str(snapshot)).vocab_size == tokenizers.load("zurück #1").vocab_size
