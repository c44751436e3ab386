"""What every refusal must be: named, and without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter import UserError


def refused(action, source, tmp_path, pattern, **options):
    before = {p: p.stat().st_mtime_ns for p in Path(source).rglob("*")}
    with pytest.raises(UserError, match=pattern):
        action(source, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*")), "something was left behind"
    assert before == {p: p.stat().st_mtime_ns for p in Path(source).rglob("*")}, "the source was touched"
