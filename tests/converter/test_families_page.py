"""docs/families.md is followed literally: its file is the one in the directory, and its commands run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from click.testing import CliRunner

from converter import config_experts, config_latent, config_layers, config_nested, config_parts, config_rope, config_router
from converter.cli import cli
from tests.converter.family_suite import save_small
from tests.models import model_tree

HOME = Path(__file__).parents[2]
PAGE = (HOME / "docs" / "families.md").read_text()


def test_the_page_s_example_is_the_family_s_file():
    (file,) = re.findall(r"This is\n`(converter/families/\w+\.py)`", PAGE)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code == (HOME / file).read_text()


def test_the_page_s_commands_run(tmp_path, monkeypatch):
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
        ["qwen2", "Qwen2ForCausalLM", "weights,", "trains", "Qwen2,", "Qwen2.5,", "QwQ,", "dense"]
    ]
    assert model_tree(tmp_path / "HF_AGAIN") == model_tree(tmp_path / "HF_DIR")


def test_the_page_names_every_verb_and_every_field_of_a_family():
    from dataclasses import fields

    from converter import families, rules

    verbs = {"replicated", "column_parallel", "row_parallel", "qkv", "gated_mlp", "vocab_parallel", "sections", "copy_of"}
    assert verbs <= {*vars(rules)}
    for name in (*verbs, *(field.name for field in fields(families.Family)), *rules.Options.__annotations__):
        assert name in PAGE, name


def test_the_page_names_every_field_of_config():
    makers = [
        name
        for module in (config_experts, config_latent, config_layers, config_nested, config_parts, config_rope, config_router)
        for name, member in vars(module).items()
        if getattr(member, "__module__", "") == module.__name__
        and getattr(member, "__annotations__", {}).get("return") in ("Field", "tuple[Field, ...]", "Types")
        and not name.startswith("_")
    ]
    assert {"window_pattern", "rope_by_type", "rms_norm", "not_computed", "sparse_layers"} <= {*makers}
    for name in makers:
        assert f"`{name}`" in PAGE, name
