"""Functions are short enough to be read at once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 40
"""Lines from `def` to the end, without the docstring."""


@pytest.mark.parametrize("folder", ["benchmarks", "converter", "examples", "formats", "trainer"])
def test_no_function_is_longer_than_the_limit(folder):
    lengths = {
        f"{path.relative_to(ROOT)}: {function.name}": length(function)
        for path in (ROOT / folder).rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > LIMIT} == {}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first, end = function.body[0], function.end_lineno or 0
    docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) else 0
    return end - function.lineno + 1 - docstring


def test_a_docstring_does_not_count():
    (function,) = ast.parse('def f(\n    x,\n):\n    """One.\n\n    Two.\n    """\n    return x\n').body
    assert isinstance(function, ast.FunctionDef)
    assert length(function) == 4
