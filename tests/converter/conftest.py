"""A source and a checkpoint that a test may damage."""

from __future__ import annotations

import shutil

import pytest

from converter import hf_to_mcore


@pytest.fixture
def source(model_folder, tmp_path):
    """A model in several files, free to be damaged."""
    shutil.copytree(model_folder("gqa", dtype="bfloat16", max_shard_size="60KB"), tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def checkpoint(model_folder, tmp_path):
    """A converted model, free to be damaged."""
    hf_to_mcore(model_folder("gqa", dtype="bfloat16"), tmp_path / "megatron", tp=2, pp=2)
    return tmp_path / "megatron"
