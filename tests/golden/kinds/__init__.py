"""Small checkpoints of other kinds, made by megatron-core 0.8.0 (zarr) and Megatron-LM 0.19.0 (the others): two or four
layers, hidden size 32 or 64, a vocabulary of 89 tokens padded to 96, trained for two or three steps.

`NAME_as_torch_dist` is the state of `NAME` in another kind of checkpoint. So is, for the optimizer, `NAME_flattened`
(`fully_sharded_model_space` of megatron-core 0.8.0)."""

from __future__ import annotations

import tarfile
from pathlib import Path


def unpacked(name: str, folder: Path) -> Path:
    """Unpack a checkpoint below `folder` and return its root."""
    target = folder / name
    with tarfile.open(Path(__file__).parent / f"{name}.tar.xz") as archive:
        archive.extractall(target, filter="data")
    return next(target.iterdir())
