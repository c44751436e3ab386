"""Check that all hosts share the folder of checkpoints: all ranks write a checkpoint together, and it must be complete."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import torch.distributed as dist

from formats.errors import UserError
from trainer import collectives

_PATIENCE_S = 3.0
"""Seconds until a network file system must show a file that another host has made."""


def check(root: Path) -> None:
    """Raise UserError, on all ranks, if rank 0 makes a file in `root` that another rank does not see. All ranks call this."""
    if dist.get_world_size() == 1:
        return
    probe = root / collectives.from_first_rank(lambda: f".shared-{secrets.token_hex(8)}")
    try:
        collectives.on_first_rank(probe.touch)
        unseen = collectives.name_ranks(not _appears(probe))
        collectives.on_first_rank(lambda: probe.unlink(missing_ok=True))
    except OSError as error:
        raise UserError(
            f"`checkpoint.save` is `{root}`, which cannot be written to: {error.strerror}",
            hint="give a folder that can be made or written to",
        ) from error
    if unseen:
        raise not_shared(root, unseen)


def not_shared(root: Path, unseen: str) -> UserError:
    """Return the error for a folder that hosts do not share; `unseen` names the ranks that see another."""
    return UserError(
        f"hosts do not share `checkpoint.save`, `{root}`: {unseen} does not see what rank 0 writes there",
        hint="name a folder of a file system that all hosts share, by its absolute path",
    )


def _appears(path: Path) -> bool:
    """Return whether a file is visible. Lists the folder, so that a network file system asks its server again."""
    until = time.monotonic() + _PATIENCE_S
    while not (exists := path.parent.is_dir() and path in path.parent.iterdir()):
        if time.monotonic() >= until:
            break
        time.sleep(0.1)
    return exists
