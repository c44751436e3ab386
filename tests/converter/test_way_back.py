"""Quantized weights come back as the same bytes where they are unchanged, and as plain numbers where they are not."""

from __future__ import annotations

import pytest

from converter import hf_to_mcore, mcore_to_hf
from converter.execution import Reporter
from tests import quantized_models
from tests.models import model_tree


@pytest.fixture(scope="module")
def source(model_folder, tmp_path_factory):
    """A Llama in FP8."""
    return quantized_models.fp8(model_folder("gqa", dtype="bfloat16"), tmp_path_factory.mktemp("fp8") / "hf")


@pytest.fixture
def notes():
    return []


@pytest.fixture
def reporter(notes):
    return Reporter(note=notes.append)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 4, "pp": 2}], ids=str)
def test_unchanged_weights_come_back_as_the_same_bytes(source, tmp_path, layout, notes, reporter):
    hf_to_mcore(source, tmp_path / "m", verify=True, **layout)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True, reporter=reporter)
    assert model_tree(tmp_path / "back") == model_tree(source)
    assert "28 weights are written as they came: FP8 in blocks of 32 x 32" in notes


def untold(folder):
    """Take away what says that a checkpoint is untouched."""
    (folder / "iter_0000000" / "conversion.json").unlink()


def test_without_a_record_every_weight_is_compared(source, tmp_path, notes, reporter):
    hf_to_mcore(source, tmp_path / "m", tp=2)
    untold(tmp_path / "m")
    mcore_to_hf(tmp_path / "m", tmp_path / "back", reporter=reporter)
    assert model_tree(tmp_path / "back") == model_tree(source)
