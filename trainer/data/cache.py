"""Index arrays that are made once and mapped by every process of a node.

Knows files and ranks, not what the arrays say. Whoever finds nothing makes the arrays and renames a whole folder into place, so
several makers at once do no harm: they make the same.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from formats.errors import UserError

type Arrays = tuple[np.ndarray, ...]

SMALL = 2**20
"""Entries below which arrays are made again in every process, in some milliseconds, instead of kept in files."""


def kept(folder: Path, name: str, entries: int, make: Callable[[], Arrays]) -> Arrays:
    """What `make` returns: from `folder / name` if it is there, else put there first. Small arrays are never put there."""
    if entries < SMALL:
        return make()
    whole = folder / name
    if not whole.is_dir():
        try:
            put(whole, partial(_save, make()))
        except OSError as error:
            raise cannot_write(folder, "indices", error) from error
    files = sorted(whole.glob("*.npy"))
    return tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in files)


def cannot_write(folder: Path, what: str, error: OSError) -> UserError:
    """What to say of a cache that nothing can be put into."""
    return UserError(
        f"cannot write {what} to `{folder}`: {error.strerror}",
        hint="set `dataset.path_to_cache` to a folder that can be written",
    )


def _save(arrays: Arrays, folder: Path) -> None:
    for number, array in enumerate(arrays):
        with (folder / f"{number}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())


def put(whole: Path, write: Callable[[Path], None]) -> bool:
    """A folder that `write` fills, at `whole` once it is whole; one that is there already stays, and the answer is False."""
    unfinished = whole.with_name(f"{whole.name}.partial-{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        with contextlib.suppress(OSError):  # another was faster
            unfinished.rename(whole)
        if not whole.is_dir():
            unfinished.rename(whole)
        return not unfinished.exists()
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def in_turn[T](make: Callable[[], T]) -> T:
    """`make()` on rank 0, then on the first rank of each node, then on the others.

    Each finds the files of those before it; a node that does not share rank 0's folder makes its own. What a person has to
    correct on one rank is a UserError on all of them. Others wait as long as it takes: tokens of many examples take longer than
    any message. Without torch.distributed, just `make()`.
    """
    from torch import distributed  # noqa: PLC0415 - slow to import, as what follows

    if not (distributed.is_available() and distributed.is_initialized()):
        return make()
    from trainer.device import local_rank  # noqa: PLC0415

    local = local_rank(os.environ)
    mine = 0 if distributed.get_rank() == 0 else 1 if local == 0 else 2
    made: list[T] = []
    group = distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    for turn in range(3):
        _together(made, make if turn == mine else None, group)
    distributed.destroy_process_group(group)
    return made[0]


def _together[T](made: list[T], make: Callable[[], T] | None, group: Any) -> None:
    """Some ranks make something, the others wait for them, and all raise what one of them found wrong."""
    from torch import distributed  # noqa: PLC0415

    wrong: list[UserError | None] = [None] * distributed.get_world_size()
    here = None
    try:
        if make is not None:
            made.append(make())
    except UserError as error:
        here = error
    distributed.all_gather_object(wrong, here, group=group)
    for error in wrong:
        if error is not None:
            raise error
