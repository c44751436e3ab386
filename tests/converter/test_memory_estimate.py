"""What `--dry-run` says of memory is made of what planning took, the pieces there are, and the upload."""

from __future__ import annotations

from converter.memory_estimate import piece_buffers
from converter.plan import Copy, Making
from formats.spec import DTYPES, TensorSpec

MIB = 1 << 20


def made(shape, dtype, source):
    return Making(TensorSpec("t", shape, DTYPES[dtype]), (Copy("s", DTYPES[source], 0, 0, shape[0]),))


def test_a_worker_holds_the_largest_piece_and_what_it_is_cast_from():
    assert piece_buffers([]) == 0
    assert piece_buffers([made((10, 4), "bf16", "bf16")]) == 80
    assert piece_buffers([made((4096, 4096), "bf16", "bf16"), made((10, 4), "bf16", "bf16")]) == 4 * MIB
    assert piece_buffers([made((2, 8 * MIB), "fp32", "bf16")]) == 4 * MIB + 2 * MIB
    assert piece_buffers([made((128, 2880, 5760), "bf16", "bf16")]) <= 4 * MIB
