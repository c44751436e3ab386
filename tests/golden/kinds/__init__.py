"""Small checkpoints of other kinds, made by megatron-core 0.8.0 (zarr) and Megatron-LM 0.19.0 (the others): two or four
layers, hidden size 32 or 64, a vocabulary of 89 tokens padded to 96, trained for two or three steps.

`NAME_as_torch_dist` is the state of `NAME` in another kind of checkpoint. So is, for the optimizer, `NAME_flattened`
(`fully_sharded_model_space`), `NAME_buckets` (`dp_reshardable`, or `fully_sharded_bucket_space` of megatron-core 0.8.0)
and `NAME_gathered` (`dp_zero_gather_scatter`).

Of `ranks_dp3_six_buckets` megatron-core 0.19.2 writes a wrong `fully_reshardable` twin, as `optimizer_state/shifted` is one;
`optimizer_state/by_buckets` is its `dp_reshardable` twin.

`dcp_hf` is a Llama of transformers under FSDP2, two layers, hidden size 32, 91 tokens, saved by torch 2.11 as two processes in
five ways, all of the same weights: a distributed checkpoint, the same with safetensors inside or as zstd streams, safetensors
in slices, and these joined by torch.
"""

from __future__ import annotations

import tarfile
from pathlib import Path


def unpacked(name: str, folder: Path) -> Path:
    """Unpack a checkpoint below `folder` and return its root."""
    target = folder / name
    with tarfile.open(Path(__file__).parent / f"{name}.tar.xz") as archive:
        archive.extractall(target, filter="data")
    return next(target.iterdir())
