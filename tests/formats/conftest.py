"""Whatever is read here is read by nobody's credentials but ours."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _at_home(at_home: None) -> None:
    """See there."""
