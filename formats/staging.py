"""Write an output directory atomically: it does not exist until it is complete.

Everything is written to a partial directory beside it, which is synced and renamed on success. A run that fails or is killed
leaves nothing at DST, and a partial directory from which a later run can resume.
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
"""Errors of file systems that do not sync directories."""


def check_room(target: Path, needed: int, *, already: Path) -> None:
    """Raise TransientError if the disk has less than `needed` bytes free, counting those that `already`, the partial directory,
    occupies. File systems that do not report their size pass."""
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
    """Raise UserError if a file does not have its planned size."""
    for name, size in planned.items():
        actual = (directory / name).stat().st_size
        if actual != size:
            raise UserError(f"`{name}` has {actual} bytes, planned were {size}", hint="did a source change during the run?")


MANIFEST = "job.json"
_COMMIT = "commit.json"

Manifest = Mapping[str, Any]
"""What must be equal for a run to resume another: plain data, by topic."""


@dataclass(slots=True)
class Stage:
    """The partial directory of an output; `state`, beside it, holds what a later run needs to resume."""

    partial: Path
    state: Path
    resumed: bool = False
    worth_keeping: bool = False
    """Has anything been done that a later run can reuse?"""

    spoilt: bool = False
    """True if verification failed: the partial output must not be resumed."""


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
    """Provide a directory to write into, which becomes `target` when the block succeeds.

    After a failure it is kept if it is worth keeping, `note` is called, and `resume` continues there. An existing `target` is
    replaced if `rule` allows it and it has not changed since the start. Raises UserError for leftovers of an earlier run without
    `resume`, and with `resume` if that run had another manifest. Only the first rank prepares, commits and removes.
    """
    with user_errors(target):
        stage = Stage(partial, _state(partial))
        if together.is_first:
            _put_back(target, note)
            before = look(target, rule=rule)
            stage.resumed = stage.worth_keeping = _can_resume(target, partial, manifest, resume=resume)
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
    """Keep or remove the partial directory at the end, unless another run has taken it over."""
    try:
        yield
    except BaseException as error:
        if _is_published(stage.partial) or not _is_kept(stage, error, together):
            if together.holds():
                _remove(stage.partial)
        else:
            note(f"`{stage.partial}` keeps what is done: {_resume_or_remove(stage.partial)}")
        if _replaced(stage.partial).is_dir() and not os.path.lexists(target):
            note(f"`{target}` as it was before is `{_replaced(stage.partial)}`: rename it, or the next run restores it")
        raise
    if together.holds():
        _remove(stage.partial)
        _discard(note, stage.partial, _state(stage.partial), _replaced(stage.partial))


def _is_kept(stage: Stage, error: BaseException, together: Rendezvous) -> bool:
    """Keep nothing if the failure would repeat, unless other ranks may still be writing."""
    would_fail_again = isinstance(error, UserError) and not isinstance(error, TransientError)
    kept = stage.worth_keeping and not would_fail_again if together.alone else True
    return kept and not stage.spoilt


def _state(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.state")


def _replaced(partial: Path) -> Path:
    """Return the path of the old output while it is replaced in two steps."""
    return partial.with_name(f"{partial.name}{_REPLACED}")


def how_to_remove(partial: Path) -> str:
    """Return the command that removes the leftovers of a run, first its state: `rm` may be interrupted."""
    return f"`{shlex.join(['rm', '-r', str(_state(partial)), str(partial)])}`"


def _resume_or_remove(partial: Path) -> str:
    """Return what to do about a partial directory. An old output is named too; no command removes it."""
    old = _replaced(partial)
    kept = f"; `{old}` is the previous output, which is kept until a new one is complete" if old.is_dir() else ""
    return f"finish it with the same command and `--resume`, or remove it: {how_to_remove(partial)}{kept}"


def _remove(partial: Path) -> None:
    """Remove a partial directory and its state, manifest first: an interrupted removal leaves nothing to resume."""
    with suppress(OSError):
        (_state(partial) / MANIFEST).unlink()
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(_state(partial), ignore_errors=True)


def _discard(note: Callable[[str], None], *paths: Path) -> None:
    """Remove unneeded directories. `note` names those that cannot be removed, which may be as large as the output."""
    for path in paths:
        errors: list[BaseException] = []
        shutil.rmtree(path, onexc=lambda _call, _path, error, errors=errors: errors.append(error))
        if os.path.lexists(path):
            why = next((error.strerror for error in errors if isinstance(error, OSError) and error.strerror), "unknown")
            note(f"`{path}` is not needed any more and could not be removed ({why}): `{shlex.join(['rm', '-r', str(path)])}`")


def _put_back(target: Path, note: Callable[[str], None]) -> None:
    """Restore the old output if a run was killed after moving it away and before the new one was in place."""
    moved = [path for path in _leftovers(target) if path.name.endswith(_REPLACED)]
    if not moved or os.path.lexists(target):
        return
    latest = max(moved, key=lambda path: path.stat().st_ctime_ns)
    latest.rename(target)
    sync(target.parent)
    note(f"`{target}` was restored from `{latest}`, where an interrupted run had moved it")


def _can_resume(target: Path, partial: Path, manifest: Manifest, *, resume: bool) -> bool:
    """Is there a run to resume? Raises UserError if there is one without `resume`, or with another manifest."""
    left = list(_resumable(target))
    if left and not resume:
        raise UserError(f"an interrupted run left `{left[0]}`", hint=_resume_or_remove(left[0]))
    for path in left:
        _check_unchanged(path, manifest)
    return partial in left


def _begin(stage: Stage, manifest: Manifest) -> None:
    _remove(stage.partial)
    for folder in (stage.partial, stage.state):
        if os.path.lexists(folder):
            hint = f"remove it yourself: {how_to_remove(stage.partial)}"
            raise UserError(f"`{folder}` was left by an earlier run and could not be removed", hint=hint)
        folder.mkdir(parents=True)
    put(stage.state / MANIFEST, json.dumps(manifest).encode())


def put(path: Path, data: bytes) -> None:
    """Write a small file atomically and durably."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(data)
    sync(new)
    new.replace(path)
    sync(path.parent)


def _leftovers(target: Path) -> Iterator[Path]:
    """Yield all directories that runs for this target may have left."""
    for path in sorted(target.parent.glob(f"{glob.escape(target.name)}.partial-*")):
        if _OF_A_RUN.fullmatch(path.name.removeprefix(target.name)) and path.is_dir():
            yield path


def _resumable(target: Path) -> Iterator[Path]:
    """Yield partial directories of earlier runs that have a manifest. After a completed commit, the directory is the replaced
    output instead, and is not yielded."""
    for path in _leftovers(target):
        if (_state(path) / MANIFEST).is_file() and not _is_published(path):
            yield path


def _sweep(target: Path, note: Callable[[str], None], *, but: Path) -> None:
    """Remove the leftovers of dead runs after a commit, except those of `but`, which other ranks of this run still use."""
    _discard(note, *(path for path in _leftovers(target) if not path.name.startswith(but.name)))


def _check_unchanged(partial: Path, now: Manifest) -> None:
    """Raise UserError if the interrupted run had another manifest."""
    try:
        before = dict(json.loads((_state(partial) / MANIFEST).read_bytes()))
    except ValueError:
        hint = f"remove it: {how_to_remove(partial)}"
        raise UserError(f"`{_state(partial) / MANIFEST}` is damaged", hint=hint) from None
    for topic in {**now, **before}:
        old, new = json.dumps(before.get(topic)), json.dumps(now.get(topic))
        if old != new:
            raise UserError(
                f"`{partial}` was begun with {topic} {old}, now it is {new}",
                hint=f"resume with what it was begun with, or remove it: {how_to_remove(partial)}",
            )


def sync_tree(directory: Path) -> None:
    """Sync every file and folder below a directory, on 4 threads."""
    paths = [directory, *directory.rglob("*")]
    with ThreadPoolExecutor(4, thread_name_prefix="fsync") as pool:
        list(pool.map(sync, paths))


def sync(path: Path) -> None:
    """Sync a file or a folder. Errors of file systems that do not sync folders are ignored, for folders only."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC or not S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def _publish(stage: Stage, target: Path, before: Present | None) -> None:
    """Rename the partial directory to `target`. An old output must equal `before`; the two are exchanged, and `partial` is to be
    removed afterwards."""
    partial, then = stage.partial, "give the same command again with `--resume`"
    put(stage.state / _COMMIT, str(partial.stat().st_ino).encode())
    check_unchanged(before, present(target), then=then)
    exchanged = take_place(partial, target) == partial
    if exchanged and (now := present(partial)):  # nothing that was added since the check is lost
        try:
            check_unchanged(before, replace(now, label=str(target)), then=then)
        except UserError:
            take_place(partial, target)
            raise


def take_place(new: Path, target: Path) -> Path | None:
    """Rename a directory to `target`, durably. An existing one is exchanged: returns its new path, to be removed."""
    old = None
    if not os.path.lexists(target):
        new.rename(target)
    elif _exchange(new, target):
        old = new
    else:
        old = _swap(new, target)
    sync(target.parent)
    return old


def _is_published(partial: Path) -> bool:
    """Was `partial` committed? Then its name is free, or it is the old output, which is another directory."""
    try:
        number = int((_state(partial) / _COMMIT).read_text())
    except (OSError, ValueError):
        return False
    return not os.path.lexists(partial) or partial.stat().st_ino != number


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two directories atomically; False where the system or the file system does not support it."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(_AT_FDCWD, bytes(first), _AT_FDCWD, bytes(second), _EXCHANGE) == 0


def _swap(partial: Path, target: Path) -> Path:
    """Replace `target` in two renames. The first is undone if the second fails, and by `_put_back` after a kill."""
    old = _replaced(partial)
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    return old
