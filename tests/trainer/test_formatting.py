"""Numbers for a person."""

from __future__ import annotations

import doctest

import pytest

from trainer import formatting


def test_the_examples_in_the_docstrings_are_right() -> None:
    assert doctest.testmod(formatting) == doctest.TestResults(failed=0, attempted=4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formatting.size(52_400_000), "52.4 MB"),
        (formatting.size(100_000_000), "0.1 GB"),
        (formatting.steps(1), "1 step"),
        (formatting.number(257), "257"),
        (formatting.duration(60), "1 min"),
    ],
)
def test_numbers_near_a_change_of_units(text: str, expected: str) -> None:
    assert text == expected
