"""The examples in the docstrings of data, PEFT and generation are run."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module

import pytest

import trainer.data
import trainer.generation
import trainer.peft

pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank:UserWarning")

MODULES = [
    "trainer.data",
    "trainer.segments",
    *(
        module.name
        for package in (trainer.data, trainer.generation, trainer.peft)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ),
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_say(name):
    assert doctest.testmod(import_module(name)).failed == 0
