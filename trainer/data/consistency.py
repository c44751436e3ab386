"""Check that all ranks read the same data. Hosts without a shared disk may have different files under the same names.

Compares the lengths and fingerprints of datasets, and the hashes of tokenizer files.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from typing import Any

import blake3
import numpy as np
import torch.distributed as dist

from formats.errors import UserError
from trainer.tokenizers import Tokenizer

_SPLITS = ("training data", "validation data", "test data")
_MAX_SAMPLED = 64
"""Parts of a large file that are hashed in place of all of it, evenly spaced."""


def check_ranks(datasets: Sequence[Any], tokenizer: Tokenizer | None) -> None:
    """Raise UserError, on all ranks, if a rank has other data or another tokenizer than rank 0. All ranks call this."""
    if dist.get_world_size() == 1:
        return
    identities = zip(_SPLITS, map(_dataset_identity, datasets), strict=False)
    local = dict(identities) | _tokenizer_hashes(tokenizer)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (platform.node(), local))
    first_host, expected = gathered[0]
    for rank, (host, actual) in enumerate(gathered):
        differs = next((name for name in expected | actual if expected.get(name) != actual.get(name)), None)
        if differs:
            raise UserError(
                f"ranks read different data: the {differs} of rank {rank}, on `{host}`, differs from that of rank 0, on "
                f"`{first_host}`",
                hint="copy the same files to all hosts, under the same names; or name files on a disk that they share",
            )


def _dataset_identity(dataset: Any) -> Any:
    """Return the length and, if the dataset has one, the `fingerprint`; for several datasets, those by name."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: _dataset_identity(member) for name, member in dataset.items()}
    return len(dataset), dataset.fingerprint() if hasattr(dataset, "fingerprint") else ""


def _tokenizer_hashes(tokenizer: Tokenizer | None) -> dict[str, str]:
    if tokenizer is None or tokenizer.name == "byte":
        return {}
    return {f"tokenizer's `{name}`": hashlib.sha256(data).hexdigest() for name, data in tokenizer.files().items()}


def fingerprint(*parts: bytes | np.ndarray) -> str:
    """Return the BLAKE3 hash of the parts, one after another, in hex."""
    digest = blake3.blake3()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def spread_indices(count: int) -> list[int]:
    """Return at most 64 indices below `count`, evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, _MAX_SAMPLED)).astype(int)).tolist()
