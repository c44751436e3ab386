"""What the trainer's tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import Ranks

END = 2
"""The token that ends an answer, in small models of families."""


@pytest.fixture(scope="session")
def ranks(processes: Ranks) -> Ranks:
    """Processes that run the trainer, which forms process groups by itself."""
    return processes


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A small model of a family in fp32, with a tokenizer, once for each family and change. Not to be written into."""
    from tests import models
    from tests.converter.family_suite import small_model  # which imports transformers' models

    made: dict[tuple[str, str], Path] = {}

    def make(family: str, **changes) -> Path:
        key = family, repr(changes)
        if key not in made:
            model = small_model(family, dtype="float32", **changes)
            model.config.eos_token_id = model.generation_config.eos_token_id = END
            made[key] = models.save(model, tmp_path_factory.mktemp(family) / "hf")
        return made[key]

    return make
