"""What torch reads of the data files of a distributed checkpoint."""

from __future__ import annotations

import io
import pickle
from functools import cache

import torch


@cache
def bytes_by_torch(metadata: bytes, files: tuple[tuple[str, bytes], ...]) -> frozenset[bytes]:
    """Return the bytes of every chunk, as torch reads them."""
    chunks: set[bytes] = set()
    for index, info in pickle.loads(metadata).storage_data.items():
        raw = dict(files)[info.relative_path][info.offset : info.offset + info.length]
        if index.offset is not None:
            tensor = torch.load(io.BytesIO(raw), weights_only=True)
            chunks.add(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return frozenset(chunks)
