"""Cache files that are made once and mapped by every process of a node.

A folder is written under a temporary name and renamed when it is complete. Several processes may write the same folder at once:
all write the same contents, and the first to rename wins.
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

MIN_CACHED_ENTRIES = 2**20
"""Entries below which arrays are computed in every process, in a few milliseconds, and not cached."""


def cached_arrays(folder: Path, name: str, entries: int, make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays of `make`, memory-mapped from `folder / name`; they are written first if the folder is missing. With
    fewer
    than `MIN_CACHED_ENTRIES` entries, call `make` and write nothing. Raises UserError if the folder cannot be written."""
    if entries < MIN_CACHED_ENTRIES:
        return make()
    target = folder / name
    if not target.is_dir():
        try:
            write_folder(target, partial(_save, make()))
        except OSError as error:
            raise cannot_write(folder, "indices", error) from error
    files = sorted(target.glob("*.npy"))
    return tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in files)


def cannot_write(folder: Path, what: str, error: OSError) -> UserError:
    """Return the error for a cache folder that cannot be written."""
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


def write_folder(target: Path, write: Callable[[Path], None]) -> bool:
    """Create the folder `target` atomically: `write` fills a temporary folder, which is then renamed. Return False if another
    process created `target` first; its contents stay."""
    unfinished = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        with contextlib.suppress(OSError):  # another process was faster
            unfinished.rename(target)
        if not target.is_dir():
            unfinished.rename(target)
        return not unfinished.exists()
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def first_rank_first[T](make: Callable[[], T]) -> T:
    """Call `make()` on rank 0, then on the first rank of each node, then on the other ranks; return this rank's result.

    Later ranks find the files of earlier ones; a node that does not share rank 0's folder writes its own. A UserError on one
    rank is raised on all. The group's timeout is seven days, since tokenizing many examples takes longer than any collective.
    Without torch.distributed, this is `make()`.
    """
    from torch import distributed  # noqa: PLC0415 - slow to import, like the next

    if not (distributed.is_available() and distributed.is_initialized()):
        return make()
    from trainer.device import local_rank  # noqa: PLC0415

    local = local_rank(os.environ)
    own_turn = 0 if distributed.get_rank() == 0 else 1 if local == 0 else 2
    results: list[T] = []
    group = distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    for turn in range(3):
        _share_errors(results, make if turn == own_turn else None, group)
    distributed.destroy_process_group(group)
    return results[0]


def _share_errors[T](results: list[T], make: Callable[[], T] | None, group: Any) -> None:
    """Call `make` if it is given and append its result; wait for all ranks, and raise the first UserError of any of them."""
    from torch import distributed  # noqa: PLC0415

    errors: list[UserError | None] = [None] * distributed.get_world_size()
    local_error = None
    try:
        if make is not None:
            results.append(make())
    except UserError as error:
        local_error = error
    distributed.all_gather_object(errors, local_error, group=group)
    for error in errors:
        if error is not None:
            raise error
