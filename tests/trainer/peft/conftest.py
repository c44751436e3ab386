"""A small mixture of experts to adapt."""

from __future__ import annotations

import pytest

from tests.trainer.peft.test_experts import train


@pytest.fixture(scope="session")
def start(ranks, tmp_path_factory):
    """The same experts for every layout."""
    folder = str(tmp_path_factory.mktemp("moe"))
    ranks.run(train, 1, None, {}, None, {}, {"save": folder})
    return folder
