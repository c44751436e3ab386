"""Shared fixtures: megatron-core on a few processes, tiny models made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import models
from tests.megatron_cpu import Ranks

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that run megatron-core."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A saved model by its variant and options, made once a session. Not to be written into."""
    made: dict[str, Path] = {}

    def make(variant: str = "gqa", *, max_shard_size: str = "5GB", **options) -> Path:
        key = repr((variant, max_shard_size, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(variant) / "model"
            made[key] = models.save(models.build(variant, **options), folder, max_shard_size=max_shard_size)
        return made[key]

    return make


@pytest.fixture
def golden() -> Path:
    """Files made by megatron-core with Transformer Engine, and by Megatron-Bridge."""
    return GOLDEN
