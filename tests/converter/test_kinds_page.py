"""docs/checkpoints.md says of each kind of checkpoint what the code and the small checkpoints of the tests say."""

from __future__ import annotations

from benchmarks.kinds_table import PAGE, page


def test_the_page_of_kinds_is_current():
    assert PAGE.read_text() == page(), "run `python -m benchmarks.kinds_table --write`"
