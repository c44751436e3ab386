"""What the trainer's tests share."""

from __future__ import annotations

import pytest

from tests.trainer.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """Processes that stand for GPUs, for all tests."""
    found = Ranks()
    yield found
    found.close()
