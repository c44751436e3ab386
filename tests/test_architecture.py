"""docs/architecture.md names files that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_files_that_it_names_are_there():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:formats|converter|trainer|adapters|families)/[\w/.]*)`", page))
    assert len(named) > 30
    assert [name for name in named if not any((room / name).exists() for room in (ROOT, ROOT / "converter"))] == []
    modules = set(re.findall(r"\b\w+\.py\b", page))
    known = {path.name for path in ROOT.glob("*.py")} | {
        path.name for room in ("formats", "converter", "trainer") for path in (ROOT / room).rglob("*.py")
    }
    assert modules <= known, modules - known
