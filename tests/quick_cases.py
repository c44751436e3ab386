"""Leave most cases of tests that take long to `make test-slow`: `quick_cases.toml` names those that `make test` runs."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

FILE = Path(__file__).with_suffix(".toml")


def mark_others_slow(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Mark the cases that are not named. Raises UsageError if a name fits no case of the tests that were collected."""
    quick, cases_of = named_cases(), defaultdict[str, set[str]](set)
    for item in items:
        test, _, case = item.nodeid.partition("[")
        if test in quick:
            cases_of[test].add(case.removesuffix("]"))
            if case.removesuffix("]") not in quick[test]:
                item.add_marker(pytest.mark.slow)
    if any("::" in argument for argument in config.args):
        return  # single cases were asked for
    wrong = sorted(f"{test}[{case}]" for test, cases in cases_of.items() for case in set(quick[test]) - cases)
    if wrong:
        raise pytest.UsageError(f"{FILE.name} names cases that are not there: {', '.join(wrong)}")


def named_cases() -> dict[str, list[str]]:
    """Return the cases that `make test` runs, by the names of their tests, `FILE::TEST`."""
    table = tomllib.loads(FILE.read_text())
    families = table.pop("families")
    return {
        f"{file}::{test}": families if cases == "families" else cases
        for file, tests in table.items()
        for test, cases in tests.items()
    }
