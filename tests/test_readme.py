"""The commands and the Python example of the README run as printed, and its tables and its file tree are true."""

from __future__ import annotations

import re
import shlex
import shutil
import sysconfig
from pathlib import Path

import pytest

from benchmarks.convert import SHAPES, make_model
from tests.incidents import incidents
from tests.programs import run_module

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small model under the name that the README uses."""
    made = tmp_path_factory.mktemp("readme")
    make_model(made / "Llama-3.2-1B", SHAPES["tiny"])
    return made


def test_the_commands_run_in_order(folder):
    commands = re.findall(r"^(mbconvert .+?)(?:\s+#.*)?$", README.split("```bash")[2].split("```")[0], re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        words = command.split()[1:]
        done = run_module("converter", *words, cwd=folder)
        assert done.returncode == 0, (command, done.stderr)
    original, exported = ((folder / name / "model.safetensors").read_bytes() for name in ("Llama-3.2-1B", "Llama-back"))
    assert original == exported


def test_the_training_commands_run_in_order(tmp_path):
    shutil.copytree(Path(sysconfig.get_paths()["stdlib"]) / "json", tmp_path / "sources")
    commands = re.findall(r"^(mb(?:train|convert) .+?)(?:\s+#.*)?$", README.split("```bash")[3].split("```")[0], re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        program, *words = shlex.split(command)
        words += ["train.train_iters=2", "validation.eval_iters=1"] if words[0] == "pretrain" else []
        module = {"mbtrain": "trainer", "mbconvert": "converter"}[program]
        done = run_module(module, *words, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    assert {path.name for path in (tmp_path / "llama-hf").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_the_python_example_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    code = README.split("```python")[1].split("```")[0].replace('"megatron"', '"from-python"')
    exec(compile(code, "README.md", "exec"), {})
    assert int(capsys.readouterr().out) > 30_000_000


def test_the_file_tree_names_what_is_there():
    root = Path(__file__).parent.parent
    tree = README.split("## Source tree")[1].split("```")[1]
    named = set(re.findall(r"\b\w+\.py\b", tree))
    packages = ("formats", "converter", "trainer")
    modules = {path.name for folder in packages for path in (root / folder).glob("*.py")} - {"__init__.py", "__main__.py"}
    modules.add("mbtools.py")
    assert modules <= named, modules - named
    others = {path.name for folder in ("tests", "benchmarks") for path in (root / folder).glob("*.py")}
    assert named <= modules | others, named - modules - others


def test_each_incident_ends_as_the_table_says(tmp_path):
    rows = list(incidents(tmp_path))
    assert len(rows) == 11
    for incident, output in rows:
        assert f"| {incident} | {output} |\n" in README, (incident, output)


def test_the_two_commands_are_makes_targets():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README.split("```bash")[1].split("```")[0], re.MULTILINE):
        assert f"\n{target}:" in makefile
