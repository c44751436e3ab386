"""How much planning takes, and whether `--dry-run`'s figure for memory is what a conversion takes.

python benchmarks/plan.py [--tensors 45000 --tensors 200000] [--folder DIR]
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.convert import make_model

ROWS = 300  # tensors in a file


def shape(tensors: int) -> dict:
    """A Llama of tiny layers with that many tensors."""
    return {
        "hidden": 16,
        "layers": (tensors + 8) // 9,
        "heads": 2,
        "groups": 2,
        "head_dim": 8,
        "ffn": 16,
        "vocab": 16,
        "tied": False,
    }


if __name__ == "__main__":
    import sys

    make_model(Path(sys.argv[2]), shape(int(sys.argv[1])), data=False, shard_bytes=4096 * 40)
