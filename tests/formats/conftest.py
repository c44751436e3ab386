"""Files to read from servers. Whatever is read here is read by nobody's credentials but ours."""

from __future__ import annotations

import json
import os

import pytest

from tests.locations import BIG


@pytest.fixture(autouse=True)
def _at_home(at_home: None) -> None:
    """See there."""


@pytest.fixture
def files() -> dict[str, bytes]:
    """The files of a model directory, by their names."""
    index = {"metadata": {}, "weight_map": {"a": BIG, "b": "model-00002-of-00002.safetensors"}}
    return {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors.index.json": json.dumps(index).encode(),
        BIG: os.urandom(300_000),
        "model-00002-of-00002.safetensors": os.urandom(150_001),
        "tokenizer.json": os.urandom(5000),
        "LICENSE": b"",
    }
