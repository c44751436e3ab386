"""An output directory that does not exist until it is whole.

Everything is written to a partial directory beside it; success is fsync and rename. A run that fails or is killed leaves
nothing at DST, and the partial directory with what a later run needs to go on.
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import re
import shutil
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from formats.disk import explained, free_bytes
from formats.errors import UserError
from formats.rendezvous import Rendezvous

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


def check_room(target: Path, needed: int, *, already: Path) -> None:
    """Raise UserError if the disk has less free than `needed` bytes, of which some may lie `already` there."""
    free = free_bytes(target) + sum(path.stat().st_blocks * 512 for path in already.rglob("*") if path.is_file())
    if free < needed:
        raise UserError(
            f"`{target}` needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free",
            hint="free space or choose another disk",
        )


def check_sizes(directory: Path, planned: Mapping[str, int]) -> None:
    """Raise UserError if a file is not as large as it should be."""
    for name, size in planned.items():
        found = (directory / name).stat().st_size
        if found != size:
            hint = "did a source change meanwhile?"
            raise UserError(f"`{name}` came out with {found} bytes, planned were {size}", hint=hint)


MANIFEST = "job.json"

Manifest = Mapping[str, Any]
"""What must be the same for a run to go on where another stopped: plain data, by topic."""


@dataclass(slots=True)
class Stage:
    """Where an output is being written. `state` lies beside it and holds what a later run needs to go on."""

    partial: Path
    state: Path
    resumed: bool = False
    worth_keeping: bool = False
    """Has anything been done that a later run need not do again?"""


@contextmanager
def staged(
    target: Path, partial: Path, manifest: Manifest, together: Rendezvous, *, overwrite: bool, resume: bool
) -> Generator[Stage]:
    """A directory to write into; it becomes `target` when the block ends well.

    When not, it stays if it is worth keeping, and `resume` goes on there. Raises UserError for what an earlier run left
    without `resume`, and with it where that run did something else. Only the first rank prepares, commits and removes.
    """
    with explained(target):
        stage = Stage(partial, _state(partial))
        if together.is_first:
            stage = _opened(target, stage, manifest, resume=resume)
            together.arrive("prepared", {"resumed": stage.resumed})
            with _removed_if_worthless(stage, together):
                yield stage
                sync_tree(partial)
                together.check()
                _publish(partial, target, overwrite=overwrite)
                stage.worth_keeping = False
            together.arrive("committed")
        else:
            yield replace(stage, resumed=together.wait("prepared", [0])[0]["resumed"])
            together.wait("committed", [0])


@contextmanager
def _removed_if_worthless(stage: Stage, together: Rendezvous) -> Generator[None]:
    """What another run may have taken over meanwhile is left alone."""
    try:
        yield
    finally:
        if not stage.worth_keeping and together.holds():
            shutil.rmtree(stage.partial, ignore_errors=True)
            shutil.rmtree(stage.state, ignore_errors=True)


def _state(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.state")


def how_to_remove(partial: Path) -> str:
    """The command that removes what an interrupted run left."""
    return f"`rm -r {partial} {_state(partial)}`"


def _opened(target: Path, stage: Stage, manifest: Manifest, *, resume: bool) -> Stage:
    left = _left_behind(target)
    if left and not resume:
        hint = f"finish it with the same command and `--resume`, or remove it: {how_to_remove(left[0])}"
        raise UserError(f"an interrupted run left `{left[0]}`", hint=hint)
    if stage.partial in left:
        _check_unchanged(stage.partial, manifest)
        return replace(stage, resumed=True, worth_keeping=True)
    for other in left:
        _check_unchanged(other, manifest)
    for folder in (stage.partial, stage.state):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    (stage.state / MANIFEST).write_text(json.dumps(manifest))
    return stage


def _left_behind(target: Path) -> list[Path]:
    """The directories that earlier runs for this target left, and that tell what they were doing."""
    found = sorted(target.parent.glob(f"{glob.escape(target.name)}.partial-*"))
    return [path for path in found if path.is_dir() and (_state(path) / MANIFEST).is_file()]


def _read_manifest(partial: Path) -> Manifest:
    try:
        return dict(json.loads((_state(partial) / MANIFEST).read_bytes()))
    except ValueError:
        return {}


def _check_unchanged(partial: Path, now: Manifest) -> None:
    """Raise UserError if a run is not the one that was interrupted."""
    before = _read_manifest(partial)
    for topic in sorted(before.keys() | now.keys()):
        old, new = json.dumps(before.get(topic)), json.dumps(now.get(topic))
        if old != new:
            raise UserError(
                f"`{partial}` was begun with {topic} {old}, now it is {new}",
                hint=f"resume with what it was begun with, or remove it: {how_to_remove(partial)}",
            )


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
