"""An output directory that does not exist until it is whole.

Everything is written to a partial directory beside it; success is fsync and rename. A run that fails or is killed leaves
nothing at DST, and the partial directory with what a later run needs to go on.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from formats.disk import free_bytes, user_errors
from formats.errors import TransientError, UserError
from formats.rendezvous import Rendezvous
from formats.replacement import Present, Rule, check_unchanged
from formats.target import look, present

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2(2)
_AT_FDCWD = -100
_OF_A_RUN = re.compile(r"\.partial-[0-9a-f]+(\.state|\.ranks|\.replaced)?")
_REPLACED = ".replaced"
_CANNOT_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS}
"""What file systems say of a directory that need not be synced, or cannot be."""


def check_room(target: Path, needed: int, *, already: Path) -> None:
    """Raise TransientError if the disk has less free than `needed` bytes, of which some may lie in `already`, the directory
    that is written into. A file system that does not tell how large it is passes."""
    free = free_bytes(already.parent)
    if free is None:
        return
    free += sum(path.stat().st_blocks * 512 for path in already.rglob("*") if path.is_file())
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
    rule: Rule | None = None,
    resume: bool,
    note: Callable[[str], None] = lambda _text: None,
) -> Generator[Stage]:
    """A directory to write into; it becomes `target` when the block ends well.

    When not, it stays if it is worth keeping, `note` is told, and `resume` goes on there. What is at `target` is replaced if
    `rule` lets it go, and it is the same at the end as at the start. Raises UserError for what an earlier run left without
    `resume`, and with it where that run did something else. Only the first rank prepares, commits and removes.
    """
    with user_errors(target):
        stage = Stage(partial, _state(partial))
        if together.is_first:
            _put_back(target, note)
            before = look(target, rule=rule)
            stage.resumed = stage.worth_keeping = _goes_on(target, partial, manifest, resume=resume)
            with _kept_or_removed(stage, target, together, note):
                if not stage.resumed:
                    _begin(stage, manifest)
                together.arrive("prepared", {"resumed": stage.resumed})
                yield stage
                sync_tree(partial)
                together.confirm()
                _publish(stage, target, before)
            _sweep(target, note, but=partial)
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
        if _is_published(stage.partial) or not _is_kept(stage, error, together):
            if together.holds():
                _remove(stage.partial)
        else:
            note(f"`{stage.partial}` keeps what is done: {_ways_out(stage.partial)}")
        if _replaced(stage.partial).is_dir() and not os.path.lexists(target):
            note(f"`{target}` as it was before is in `{_replaced(stage.partial)}`: rename it, or the next run puts it back")
        raise
    if together.holds():
        _remove(stage.partial)
        _discard(note, stage.partial, _state(stage.partial), _replaced(stage.partial))


def _is_kept(stage: Stage, error: BaseException, together: Rendezvous) -> bool:
    """Nothing stays if what failed would fail again, unless other ranks may be writing there."""
    would_fail_again = isinstance(error, UserError) and not isinstance(error, TransientError)
    kept = stage.worth_keeping and not would_fail_again if together.alone else True
    return kept and not stage.spoilt


def _state(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.state")


def _replaced(partial: Path) -> Path:
    """Where the old output is while the new one takes its place in two steps."""
    return partial.with_name(f"{partial.name}{_REPLACED}")


def how_to_remove(partial: Path) -> str:
    """The command that removes what an interrupted run left. First what says how far it came: `rm` may be interrupted."""
    return f"`{shlex.join(['rm', '-r', str(_state(partial)), str(partial)])}`"


def _ways_out(partial: Path) -> str:
    """What to do about a partial directory. An output that it was to replace is named too, and no command removes that."""
    old = _replaced(partial)
    kept = f"; `{old}` is an output that stood there before, which stays until another is whole" if old.is_dir() else ""
    return f"finish it with the same command and `--resume`, or remove it: {how_to_remove(partial)}{kept}"


def _remove(partial: Path) -> None:
    """In an order that leaves nothing to go on with, wherever it is interrupted."""
    with suppress(OSError):
        (_state(partial) / MANIFEST).unlink()
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(_state(partial), ignore_errors=True)


def _discard(note: Callable[[str], None], *paths: Path) -> None:
    """Remove what nobody needs any more; what cannot be removed is named, for it may be as large as the output."""
    for path in paths:
        errors: list[BaseException] = []
        shutil.rmtree(path, onexc=lambda _call, _path, error, found=errors: found.append(error))
        if os.path.lexists(path):
            why = next((error.strerror for error in errors if isinstance(error, OSError) and error.strerror), "unknown")
            note(f"`{path}` is not needed any more and could not be removed ({why}): `{shlex.join(['rm', '-r', str(path)])}`")


def _put_back(target: Path, note: Callable[[str], None]) -> None:
    """Give the old output its name again, where a run was killed after it had moved that away and before the new one came."""
    moved = [path for path in _of_runs(target) if path.name.endswith(_REPLACED)]
    if not moved or os.path.lexists(target):
        return
    latest = max(moved, key=lambda path: path.stat().st_ctime_ns)
    latest.rename(target)
    sync(target.parent)
    note(f"`{target}` was put back from `{latest}`, where an interrupted run had moved it")


def _goes_on(target: Path, partial: Path, manifest: Manifest, *, resume: bool) -> bool:
    """Is there something to go on with? UserError if there is and it was not asked for, or is not the same."""
    left = list(_left_behind(target))
    if left and not resume:
        raise UserError(f"an interrupted run left `{left[0]}`", hint=_ways_out(left[0]))
    for one in left:
        _check_unchanged(one, manifest)
    return partial in left


def _begin(stage: Stage, manifest: Manifest) -> None:
    _remove(stage.partial)
    for folder in (stage.partial, stage.state):
        if os.path.lexists(folder):
            hint = f"remove it yourself: {how_to_remove(stage.partial)}"
            raise UserError(f"`{folder}` is left of an earlier run and could not be removed", hint=hint)
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
        if (_state(path) / MANIFEST).is_file() and not _is_published(path):
            yield path


def _sweep(target: Path, note: Callable[[str], None], *, but: Path) -> None:
    """With the output in its place, remove what dead runs left; of our own ranks, all are still there."""
    _discard(note, *(path for path in _of_runs(target) if not path.name.startswith(but.name)))


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
    """Get a file or a folder onto the disk. A folder that the file system does not sync passes, a file does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC or not S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def _publish(stage: Stage, target: Path, before: Present | None) -> None:
    """Rename into place. Where an old output stands, it is what it was `before`; the two change places, and what is then
    `partial` is to be removed."""
    partial, then = stage.partial, "give the same command again with `--resume`"
    put(stage.state / _COMMIT, str(partial.stat().st_ino).encode())
    check_unchanged(before, present(target), then=then)
    exchanged = take_place(partial, target) == partial
    if exchanged and (now := present(partial)):  # what came since then is not lost either
        try:
            check_unchanged(before, replace(now, label=str(target)), then=then)
        except UserError:
            take_place(partial, target)
            raise


def take_place(new: Path, place: Path) -> Path | None:
    """Rename a directory, and that for good. Where one stands already the two change places: answers where the old one is
    then, to be removed."""
    old = None
    if not os.path.lexists(place):
        new.rename(place)
    elif _exchange(new, place):
        old = new
    else:
        old = _swap(new, place)
    sync(place.parent)
    return old


def _is_published(partial: Path) -> bool:
    """Did what was `partial` take its place? Then its name is nobody's, or the old output's, which is another directory."""
    try:
        number = int((_state(partial) / _COMMIT).read_text())
    except (OSError, ValueError):
        return False
    return not os.path.lexists(partial) or partial.stat().st_ino != number


def _exchange(one: Path, other: Path) -> bool:
    """Change two directories' places at once; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _EXCHANGE) == 0


def _swap(partial: Path, target: Path) -> Path:
    """The same in two steps, the first undone if the second fails; `_put_back` undoes it after a kill."""
    old = _replaced(partial)
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    return old
