"""The examples in docstrings are run, in a folder with a small model, its checkpoint and an adapter for it."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest

import converter
import formats
from benchmarks.convert import make_model
from tests.every_command import SHAPE, make_adapter

MODULES = [
    module.name
    for package in (formats, converter)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]

FUNCTIONS = [name for name in converter.__all__ if inspect.isfunction(getattr(converter, name))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name: `Llama-3.2-1B`, `megatron` made of it, `adapter` (PEFT's) and `megatron-adapter` made of that."""
    made = tmp_path_factory.mktemp("examples")
    make_model(made / "Llama-3.2-1B", SHAPE)
    make_adapter(made / "adapter", SHAPE)
    converter.hf_to_mcore(made / "Llama-3.2-1B", made / "megatron", tp=2, pp=2, pp_layout=[3, 1])
    converter.adapter_to_mcore(made / "adapter", made / "megatron-adapter", base=made / "Llama-3.2-1B")
    return made


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_say(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert doctest.testmod(import_module(name)).failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_has_one_example(name):
    function = getattr(converter, name)
    examples = doctest.DocTestFinder(recurse=False).find(function, name)[0].examples
    assert len(examples) == 1
