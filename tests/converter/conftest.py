"""A source and a checkpoint that a test may damage."""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from converter import families, hf_to_mcore


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


@contextmanager
def families_from(folder, monkeypatch):
    """Let the files of a folder be families, as if they were in `converter/families`."""
    names = {f"converter.families.{file.stem}" for file in folder.glob("*.py")}
    monkeypatch.setattr(families, "__path__", [str(folder), *families.__path__])
    _forget(names)
    try:
        yield
    finally:
        _forget(names)


@pytest.fixture
def families_of_tests(monkeypatch):
    """The families of `vocabulary/`, which only tests have."""
    with families_from(Path(__file__).parent / "vocabulary", monkeypatch):
        yield


def _forget(names):
    for name in names:
        if sys.modules.pop(name, None):
            delattr(families, name.rpartition(".")[2])
