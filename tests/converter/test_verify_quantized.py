"""Checkpoints are compared by what their numbers mean where one is quantized and the other is not, and that is said."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from converter import hf_to_mcore, mcore_to_hf, verify_checkpoints
from tests import quantized_models
from tests.programs import run_module

GATE = "model.layers.1.mlp.gate_proj.weight"
SCHEME = "FP8 in blocks of 32 x 32"


@pytest.fixture(scope="module")
def sides(model_folder, tmp_path_factory):
    """A Llama in FP8, its Megatron checkpoint, and what its numbers are in bf16."""
    folder = tmp_path_factory.mktemp("sides")
    quantized_models.fp8(model_folder("gqa", dtype="bfloat16"), folder / "fp8")
    hf_to_mcore(folder / "fp8", folder / "megatron", tp=2)
    mcore_to_hf(folder / "megatron", folder / "bf16", dtype="bf16")
    return folder


@pytest.mark.parametrize("names", [("fp8", "megatron"), ("bf16", "fp8"), ("fp8", "bf16"), ("megatron", "bf16")], ids=str)
def test_the_same_numbers_are_the_same_model(sides, names):
    first, second = (str(sides / name) for name in names)
    comparison = verify_checkpoints(first, second)
    assert comparison.lines() == []
    assert comparison.schemes == {str(sides / "fp8"): SCHEME for _ in range("fp8" in names)}
    assert comparison.tensors == (39 + 28 if set(names) == {"fp8", "megatron"} else 39)  # with the scales, if both have them


def test_codes_and_scales_are_compared_where_both_have_them(sides, tmp_path):
    shutil.copytree(sides / "fp8", tmp_path / "fp8")
    assert verify_checkpoints(sides / "fp8", tmp_path / "fp8").schemes == {}

    def halve(tensors):
        tensors[GATE] = (tensors[GATE].astype(np.float32) / 2).astype(tensors[GATE].dtype)
        tensors[GATE.removesuffix(".weight") + quantized_models.SCALES] *= 2

    quantized_models.edit(tmp_path / "fp8", halve)
    comparison = verify_checkpoints(sides / "fp8", tmp_path / "fp8")
    assert {difference.name for difference in comparison.different} == {
        GATE,
        GATE.removesuffix(".weight") + quantized_models.SCALES,
    }


@pytest.mark.parametrize("other", ["megatron", "bf16"])
def test_another_code_or_scale_is_another_number(sides, tmp_path, other):
    shutil.copytree(sides / "fp8", tmp_path / "fp8")

    def change(tensors):
        tensors[GATE].view(np.uint8)[3, 5] ^= 1

    quantized_models.edit(tmp_path / "fp8", change)
    (difference,) = verify_checkpoints(tmp_path / "fp8", sides / other).different
    assert (difference.name, difference.elements, difference.first) == (GATE, 1, (3, 5))


def test_which_comparison_was_made_is_said(sides):
    done = run_module("converter", "verify", str(sides / "fp8"), str(sides / "bf16"))
    assert done.stdout.startswith("same: 39 tensors, ")
    expected = f" compared bit for bit; of `{sides / 'fp8'}` the numbers that its codes and scales mean ({SCHEME})\n"
    assert done.stdout.endswith(expected)
