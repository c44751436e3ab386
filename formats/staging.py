"""An output directory that does not exist until it is whole.

Everything is written to a partial directory beside it; success is fsync and rename. A failed run removes its partial
directory; a killed one leaves it, and nothing at DST.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from formats.disk import explained, free_bytes
from formats.errors import UserError

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2(2)
_AT_FDCWD = -100
_OF_A_MODEL = re.compile(r".*\.safetensors|iter_\d+|latest_checkpointed_iteration\.txt")


def check_target(target: Path, *sources: Path, overwrite: bool) -> None:
    """Refuse a target that would harm something: a source, output that is already there, or a folder of other things."""
    for source in sources:
        real, from_ = _resolved(target), _resolved(source)
        if real == from_ or from_ in real.parents or real in from_.parents:
            raise UserError(f"`{target}` and the source `{source}` lie in one another", hint="choose another place")
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        kind = "link" if target.is_symlink() else "file"
        raise UserError(f"`{target}` is a {kind}, not a directory", hint="choose another place")
    if not overwrite:
        raise UserError(f"`{target}` already exists", hint="choose another place, or replace it with `--overwrite`")
    if not _looks_like_a_model(target):
        raise UserError(
            f"`{target}` holds no model, so `--overwrite` does not remove it",
            hint="remove it yourself, or choose another place",
        )


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"`{path}` leads nowhere: {error}") from None


def _looks_like_a_model(directory: Path) -> bool:
    inside = {path.name for path in directory.iterdir()}
    return not inside or any(_OF_A_MODEL.fullmatch(name) for name in inside)


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
    """`partial` as an empty directory to write into; it becomes `target` when the block ends well, and goes when not.

    A lock beside it is held from before it is emptied until after it is renamed, and dies with its process.
    """
    with explained(target), _locked(partial.with_name(f"{partial.name}.lock")):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            sync_tree(partial)
            _publish(partial, target, overwrite=overwrite)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Generator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if not _take(lock, path):
        os.close(lock)
        raise UserError(f"another run is writing `{path.with_suffix('')}`", hint="wait for it, or stop it")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _take(lock: int, path: Path) -> bool:
    """Take the lock, if nobody holds it and its last holder did not remove the file in the meantime."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(lock).st_ino == path.stat().st_ino
    except OSError:
        return False


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
    """Rename into place. Where an old output stands, the two change places, and what is then `partial` is removed."""
    if not (overwrite and target.is_dir()):
        partial.rename(target)
    elif not _exchange(partial, target):
        _swap(partial, target)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Change two directories' places at once; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _EXCHANGE) == 0


def _swap(partial: Path, target: Path) -> None:
    """The same in two steps, the first undone if the second fails."""
    old = partial.with_name(f"{partial.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
