"""What `--dry-run` says of memory is made of what planning took, the pieces there are, and the upload; and what planning does
to the collector is undone."""

from __future__ import annotations

import gc

import pytest

from converter import UserError, hf_to_mcore, mcore_to_hf
from converter.memory_estimate import piece_buffers
from converter.plan import same_tensor
from formats.spec import DTYPES, TensorSpec

MIB = 1 << 20


def made(shape, dtype, source):
    return same_tensor(TensorSpec("t", shape, DTYPES[dtype]), TensorSpec("s", shape, DTYPES[source]))


def test_a_worker_holds_the_largest_piece_and_what_it_is_cast_from():
    assert piece_buffers([]) == 0
    assert piece_buffers([made((10, 4), "bf16", "bf16")]) == 80
    assert piece_buffers([made((4096, 4096), "bf16", "bf16"), made((10, 4), "bf16", "bf16")]) == 4 * MIB
    assert piece_buffers([made((2, 8 * MIB), "fp32", "bf16")]) == 4 * MIB + 2 * MIB
    assert piece_buffers([made((128, 2880, 5760), "bf16", "bf16")]) <= 4 * MIB


def test_cycles_are_searched_for_as_often_as_before_once_a_conversion_ends(model_folder, tmp_path):
    before = gc.get_threshold()
    hf_to_mcore(model_folder("gqa", dtype="bfloat16"), tmp_path / "made", dry_run=True)
    assert gc.get_threshold() == before
    with pytest.raises(UserError):
        mcore_to_hf(tmp_path, tmp_path / "made", dry_run=True)
    assert gc.get_threshold() == before
