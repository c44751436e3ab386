"""The examples in the trainer's docstrings are run, in a folder with a small model and its checkpoint."""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import os
from importlib import import_module
from pathlib import Path

import pytest

import converter
import trainer
from benchmarks.convert import make_model
from tests.every_command import SHAPE
from tests.ranks import Ranks

ROOT = Path(trainer.__path__[0])
MODULES = sorted(
    ".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)

FUNCTIONS = [name for name in trainer.__all__ if inspect.isfunction(getattr(trainer, name))]
METHODS = [f"AutoBridge.{name}" for name, _ in inspect.getmembers(trainer.AutoBridge, callable) if not name.startswith("_")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name: `Llama-3.2-1B`, and `megatron` made of it."""
    made = tmp_path_factory.mktemp("examples")
    make_model(made / "Llama-3.2-1B", SHAPE)
    converter.hf_to_mcore(made / "Llama-3.2-1B", made / "megatron", tp=2)
    return made


def run_examples(name: str, folder: str) -> tuple[int, int, str]:
    """In a rank: how many examples fail, how many there are, and what doctest printed."""
    os.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = doctest.testmod(import_module(name))
    return result.failed, result.attempted, printed.getvalue()


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_say(name: str, ranks: Ranks, folder: Path) -> None:
    ((failed, attempted, printed),) = ranks.run(run_examples, 1, name, str(folder))
    assert attempted
    assert failed == 0, printed


@pytest.mark.parametrize("name", FUNCTIONS + METHODS)
def test_a_public_function_has_an_example(name: str) -> None:
    first, _, method = name.partition(".")
    function = getattr(trainer, first)
    (doc_test, *_) = doctest.DocTestFinder(recurse=False).find(getattr(function, method) if method else function, name)
    assert doc_test.examples
