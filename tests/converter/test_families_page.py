"""docs/families.md is followed literally: its file is written into a folder of families, listed, converted with and tested."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from converter.cli import cli
from tests.converter.conftest import families_from
from tests.converter.family_suite import check_config, check_logits, check_names, check_round_trip, save_small
from tests.models import model_tree

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text()


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The folder that the page's file is written into."""
    (file,) = re.findall(r"Write `converter/families/(\w+\.py)`", PAGE)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / file).write_text(code)
    with families_from(folder, monkeypatch):
        yield folder


def test_the_page_s_example_is_a_family(example, ranks, tmp_path):
    model = save_small("qwen2", tmp_path / "hf", dtype="float32")
    check_names("qwen2", model)
    check_config("qwen2")
    (tmp_path / "work").mkdir()
    check_round_trip(model, tmp_path / "work")
    check_logits(ranks, model, tmp_path, more=example)


def test_the_page_s_commands_run(example, tmp_path, monkeypatch):
    save_small("qwen2", tmp_path / "HF_DIR")
    monkeypatch.chdir(tmp_path)
    (commands,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    ran = [shlex.split(line) for line in commands.splitlines() if line.startswith("mbconvert ")]
    assert [command[1] for command in ran] == ["families", "hf-to-mcore", "mcore-to-hf"]
    for command in ran:
        done = CliRunner().invoke(cli, command[1:])
        assert done.exit_code == 0, done.output
    listed = CliRunner().invoke(cli, ["families"]).output.splitlines()
    assert [line.split() for line in listed if line.startswith("qwen2 ")] == [
        ["qwen2", "Qwen2ForCausalLM", "weights,", "trains", "Qwen2", "and", "Qwen2.5,", "dense"]
    ]
    assert model_tree(tmp_path / "HF_AGAIN") == model_tree(tmp_path / "HF_DIR")


def test_the_page_names_every_verb_and_every_field_of_a_family():
    from dataclasses import fields

    from converter import families, rules

    verbs = {"replicated", "column_parallel", "row_parallel", "qkv", "gated_mlp", "vocab_parallel", "sections", "copy_of"}
    assert verbs <= {*vars(rules)}
    for name in (*verbs, *(one.name for one in fields(families.Family)), *rules.Options.__annotations__):
        assert name in PAGE, name
