"""A function of the trainer takes the sections of a run that it needs: the whole run only for three of them, or to hand it on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TRAINER = Path(__file__).parents[1] / "trainer"
FEWEST = 3
ROWS_OF_A_TABLE = {"_rows"}
"""Generators of rules, which are called alike."""


def takers_of_too_much(source: str) -> Iterator[str]:
    """The functions that take a whole run and read fewer sections."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or function.name in ROWS_OF_A_TABLE:
            continue
        for argument in (*function.args.args, *function.args.kwonlyargs):
            if argument.annotation is not None and ast.unparse(argument.annotation) == "RunConfig":
                sections, handed_on = uses(function, argument.arg)
                if len(sections) < FEWEST and not handed_on:
                    yield function.name


def uses(function: ast.FunctionDef, name: str) -> tuple[set[str], bool]:
    """The attributes of a name that are read, and whether the name is used without one anywhere."""
    owners = {id(node.value): node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == name]
    return {owners[id(node)] for node in names if id(node) in owners}, any(id(node) not in owners for node in names)


@pytest.mark.parametrize("module", sorted(path.relative_to(TRAINER).as_posix() for path in TRAINER.rglob("*.py")))
def test_no_function_takes_a_whole_run_for_two_sections(module: str) -> None:
    assert not list(takers_of_too_much((TRAINER / module).read_text()))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("config.model.x + config.train.y", ["f"]),
        ("config.model.x + config.train.y + config.peft.z", []),
        ("g(config)", []),
    ],
)
def test_functions_that_take_too_much_are_found(body: str, expected: list[str]) -> None:
    assert list(takers_of_too_much(f"def f(config: RunConfig) -> int:\n    return {body}")) == expected
