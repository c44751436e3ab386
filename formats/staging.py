"""An output directory that does not exist until it is whole.

Everything is written to a partial directory beside it; success is fsync and rename. A failed run removes its partial
directory; a killed one leaves it, and nothing at DST.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from formats.disk import explained, free_bytes
from formats.errors import UserError

_LOCK = ".lock"


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse a target that would harm something: the source, or output that is already there."""
    real, from_ = target.resolve(), source.resolve()
    if real == from_ or from_ in real.parents or real in from_.parents:
        raise UserError(f"`{target}` and the source `{source}` lie in one another", hint="choose another place")
    if target.exists() and not overwrite:
        raise UserError(f"`{target}` already exists", hint="choose another place, or replace it with `--overwrite`")
    if target.exists() and not target.is_dir():
        raise UserError(f"`{target}` is a file, not a directory", hint="choose another place")


def check_room(target: Path, needed: int) -> None:
    """Raise UserError if the disk has less free than `needed` bytes."""
    free = free_bytes(target)
    if free < needed:
        raise UserError(
            f"`{target}` needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free",
            hint="free space or choose another disk",
        )


@contextmanager
def staged(target: Path, partial: Path, *, overwrite: bool) -> Generator[Path]:
    """`partial` as an empty directory to write into; it becomes `target` when the block ends well, and goes when not."""
    with explained(target):
        lock = _claim(partial)
        try:
            yield partial
            (partial / _LOCK).unlink()
            sync_tree(partial)
            _publish(partial, target, overwrite=overwrite)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def _claim(partial: Path) -> int:
    """An empty partial directory, held by a lock that dies with its process; what a killed run left is removed."""
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise UserError(f"another run is writing `{partial}`", hint="wait for it, or stop it") from error
    for left in partial.iterdir():
        if left.name != _LOCK:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return lock


def sync_tree(directory: Path) -> None:
    """Get every file and folder below a directory onto the disk, several at a time."""
    paths = [directory, *directory.rglob("*")]
    with ThreadPoolExecutor(4, thread_name_prefix="fsync") as pool:
        list(pool.map(_sync, paths))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(partial: Path, target: Path, *, overwrite: bool) -> None:
    """Rename into place. An old output goes only after the new one stands where it stood."""
    old = target.with_name(f"{partial.name}.replaced")
    if overwrite and target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
