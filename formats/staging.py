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
import shlex
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.disk import explained, free_bytes
from formats.errors import TransientError, UserError
from formats.rendezvous import Rendezvous

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2(2)
_AT_FDCWD = -100
_OF_A_RUN = re.compile(r"\.partial-[0-9a-f]+(\.state|\.ranks|\.replaced)?")
_OF_A_MODEL = re.compile(r".*\.safetensors|iter_\d+|latest_checkpointed_iteration\.txt")


def check_target(target: Path, *sources: Path, overwrite: bool) -> None:
    """Refuse a target that would harm something: a source, output that is already there, or a folder of other things."""
    if target.name in ("", ".."):
        raise UserError(
            f"`{target}` has no name of its own", hint="an output is made beside its place: give the directory's name"
        )
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
        whole = "outputs appear only when they are whole, so this one needs no `--resume`"
        raise UserError(f"`{target}` already exists", hint=f"choose another place, or replace it with `--overwrite`; {whole}")
    if not _looks_like_a_model(target):
        raise UserError(
            f"`{target}` holds no model, so `--overwrite` does not remove it",
            hint="remove it yourself, or choose another place",
        )


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (RuntimeError, ValueError, OSError) as error:
        why = "it holds a null character" if isinstance(error, ValueError) else "its links lead in a circle"
        raise UserError(f"`{path}` leads nowhere: {why}", hint="choose another place") from error


def _looks_like_a_model(directory: Path) -> bool:
    inside = {path.name for path in directory.iterdir()}
    return not inside or any(_OF_A_MODEL.fullmatch(name) for name in inside)


def check_room(target: Path, needed: int, *, already: Path) -> None:
    """Raise UserError if the disk has less free than `needed` bytes, of which some may lie `already` there."""
    free = free_bytes(target) + sum(path.stat().st_blocks * 512 for path in already.rglob("*") if path.is_file())
    if free < needed:
        raise TransientError(
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
_COMMIT = "commit.json"

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

    spoilt: bool = False
    """Is what was written not to be trusted, whoever goes on?"""


@contextmanager
def staged(
    target: Path,
    partial: Path,
    manifest: Manifest,
    together: Rendezvous,
    *,
    overwrite: bool,
    resume: bool,
    note: Callable[[str], None] = lambda _text: None,
) -> Generator[Stage]:
    """A directory to write into; it becomes `target` when the block ends well.

    When not, it stays if it is worth keeping, `note` is told, and `resume` goes on there. Raises UserError for what an
    earlier run left without `resume`, and with it where that run did something else. Only the first rank prepares, commits
    and removes.
    """
    with explained(target):
        stage = Stage(partial, _state(partial))
        if together.is_first:
            stage.resumed = stage.worth_keeping = _goes_on(target, partial, manifest, resume=resume)
            with _kept_or_removed(stage, target, together, note):
                if not stage.resumed:
                    _begin(stage, manifest)
                together.arrive("prepared", {"resumed": stage.resumed})
                yield stage
                sync_tree(partial)
                together.confirm()
                _publish(stage, target, overwrite=overwrite)
            _sweep(target, but=partial)
            together.arrive("committed")
        else:
            stage.resumed = together.wait("prepared", [0])[0]["resumed"]
            yield stage
            together.wait("committed", [0])


@contextmanager
def _kept_or_removed(stage: Stage, target: Path, together: Rendezvous, note: Callable[[str], None]) -> Generator[None]:
    """What another run may have taken over meanwhile is left alone."""
    try:
        yield
    except BaseException as error:
        if _is_published(stage.partial, target) or not _is_kept(stage, error, together):
            if together.holds():
                _remove(stage.partial)
        else:
            removal = f"or remove it: {how_to_remove(stage.partial)}"
            note(f"`{stage.partial}` keeps what is done: finish it with the same command and `--resume`, {removal}")
        raise
    if together.holds():
        _remove(stage.partial)


def _is_kept(stage: Stage, error: BaseException, together: Rendezvous) -> bool:
    """Nothing stays if what failed would fail again, unless other ranks may be writing there."""
    would_fail_again = isinstance(error, UserError) and not isinstance(error, TransientError)
    kept = stage.worth_keeping and not would_fail_again if together.alone else True
    return kept and not stage.spoilt


def _state(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.state")


def how_to_remove(partial: Path) -> str:
    """The command that removes what an interrupted run left. First what says how far it came: `rm` may be interrupted."""
    return f"`{shlex.join(['rm', '-r', str(_state(partial)), str(partial)])}`"


def _remove(partial: Path) -> None:
    """In an order that leaves nothing to go on with, wherever it is interrupted."""
    with suppress(OSError):
        (_state(partial) / MANIFEST).unlink()
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(_state(partial), ignore_errors=True)


def _goes_on(target: Path, partial: Path, manifest: Manifest, *, resume: bool) -> bool:
    """Is there something to go on with? UserError if there is and it was not asked for, or is not the same."""
    left = list(_left_behind(target))
    if left and not resume:
        hint = f"finish it with the same command and `--resume`, or remove it: {how_to_remove(left[0])}"
        raise UserError(f"an interrupted run left `{left[0]}`", hint=hint)
    for one in left:
        _check_unchanged(one, manifest)
    return partial in left


def _begin(stage: Stage, manifest: Manifest) -> None:
    _remove(stage.partial)
    for folder in (stage.partial, stage.state):
        folder.mkdir(parents=True)
    put(stage.state / MANIFEST, json.dumps(manifest).encode())


def put(path: Path, data: bytes) -> None:
    """A small file, whole and on the disk or not there."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(data)
    sync(new)
    new.replace(path)
    sync(path.parent)


def _of_runs(target: Path) -> Iterator[Path]:
    """All that runs for this target may have left."""
    for path in sorted(target.parent.glob(f"{glob.escape(target.name)}.partial-*")):
        if _OF_A_RUN.fullmatch(path.name.removeprefix(target.name)) and path.is_dir():
            yield path


def _left_behind(target: Path) -> Iterator[Path]:
    """The directories that earlier runs left, and that tell what they were doing. Not those of runs that came so far that
    the output took its place: what lies there then is the output it replaced."""
    for path in _of_runs(target):
        if (_state(path) / MANIFEST).is_file() and not _is_published(path, target):
            yield path


def _sweep(target: Path, *, but: Path) -> None:
    """With the output in its place, remove what dead runs left; of our own ranks, all are still there."""
    for path in _of_runs(target):
        if not path.name.startswith(but.name):
            shutil.rmtree(path, ignore_errors=True)


def _check_unchanged(partial: Path, now: Manifest) -> None:
    """Raise UserError if a run is not the one that was interrupted."""
    try:
        before = dict(json.loads((_state(partial) / MANIFEST).read_bytes()))
    except ValueError:
        hint = f"remove it: {how_to_remove(partial)}"
        raise UserError(f"`{_state(partial) / MANIFEST}` is damaged: it does not tell what was done", hint=hint) from None
    for topic in {**now, **before}:
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
        list(pool.map(sync, paths))


def sync(path: Path) -> None:
    """Get a file or a folder onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(stage: Stage, target: Path, *, overwrite: bool) -> None:
    """Rename into place. Where an old output stands, the two change places, and what is then `partial` is to be removed."""
    partial = stage.partial
    if os.path.lexists(target) and not overwrite:
        hint = "move it away, then give the same command again with `--resume`"
        raise TransientError(f"`{target}` appeared while it was being made", hint=hint)
    put(stage.state / _COMMIT, str(partial.stat().st_ino).encode())
    take_place(partial, target)


def take_place(new: Path, place: Path) -> None:
    """Rename a directory, and that for good. Where one stands already the two change places: what is `new` then can go."""
    if not os.path.lexists(place):
        new.rename(place)
    elif not _exchange(new, place):
        _swap(new, place)
    sync(place.parent)


def _is_published(partial: Path, target: Path) -> bool:
    """Did what was `partial` take its place? Only the directory itself can tell: the old output has its name now."""
    try:
        return int((_state(partial) / _COMMIT).read_text()) == target.stat().st_ino
    except (OSError, ValueError):
        return False


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
