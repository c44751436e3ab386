"""Do all ranks read the same data? Hosts that do not share a disk may have other files under the same names.

Compares lengths, and what datasets and the tokenizer say of their files. Knows nothing of what they hold.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import blake3
import numpy as np
import torch.distributed as dist

from formats.errors import UserError
from trainer.tokenizers import Tokenizer

_SPLITS = ("training data", "validation data", "test data")
_LOOKED_AT = 64
"""Parts of a file that stand for all of it, spread evenly."""


def check(datasets: Sequence[Any], tokenizer: Tokenizer | None) -> None:
    """Raise UserError, on all ranks, if one of them has other data or another tokenizer than rank 0. All ranks call this."""
    if dist.get_world_size() == 1:
        return
    here = {name: _identity(one) for name, one in zip(_SPLITS, datasets, strict=False)} | _files(tokenizer)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (platform.node(), here))
    first, ours = everywhere[0]
    for rank, (host, theirs) in enumerate(everywhere):
        differs = next((name for name in ours | theirs if ours.get(name) != theirs.get(name)), None)
        if differs:
            raise UserError(
                f"ranks do not read the same: the {differs} of rank {rank}, on `{host}`, is not that of rank 0, on `{first}`",
                hint="the same files should be on all hosts, under the same names; or name files on a disk that they share",
            )


def _identity(dataset: Any) -> Any:
    """Its length, and the `fingerprint` of what it reads, which a dataset of one's own may lack; of several, by name."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: _identity(one) for name, one in dataset.items()}
    return len(dataset), dataset.fingerprint() if hasattr(dataset, "fingerprint") else ""


def _files(tokenizer: Tokenizer | None) -> dict[str, str]:
    if tokenizer is None or tokenizer.name == "byte":
        return {}
    return {f"tokenizer's `{name}`": hashlib.sha256(data).hexdigest() for name, data in tokenizer.files().items()}


def fingerprint(*parts: bytes | np.ndarray) -> str:
    """Return a hash of these."""
    found = blake3.blake3()
    for part in parts:
        found.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


def spread(count: int) -> Iterable[int]:
    """Return some of `count` numbers, spread evenly: of large data not all is looked at."""
    return np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(int)).tolist()
