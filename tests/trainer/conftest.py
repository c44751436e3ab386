"""What the trainer's tests share."""

from __future__ import annotations

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(processes: Ranks) -> Ranks:
    """Processes that run the trainer, which forms process groups by itself."""
    return processes
