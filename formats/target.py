"""The directory that an output is to become: what must not be harmed there, and what is there now."""

from __future__ import annotations

import os
import re
from pathlib import Path
from stat import S_ISLNK, S_ISREG

from formats.errors import UserError
from formats.replacement import Present, Rule, already_exists

_MOUNTS = Path("/proc/self/mountinfo")
_WHOLE = "; outputs appear only when they are whole, so this one needs no `--resume`"


def check_target(target: Path, *sources: Path, rule: Rule | None) -> None:
    """Refuse a target that would harm something, or cannot be made: a source, a mount point, or what `rule` does not let go
    (without one: whatever is there)."""
    if target.name in ("", ".."):
        raise UserError(
            f"`{target}` has no name of its own", hint="an output is made beside its place: give the directory's name"
        )
    for source in sources:
        if _is_within(target, source) or _is_within(source, target):
            raise UserError(f"`{target}` and the source `{source}` lie in one another", hint="choose another place")
        if target.is_dir() and (link := _link_into(target, source)):
            raise UserError(f"`{link}` of the source leads into `{target}`, which is to be replaced", hint="choose another place")
    look(target, rule=rule)


def _is_within(inner: Path, outer: Path) -> bool:
    """Is a path another one or below it? A directory that is mounted at two places has two paths and one inode."""
    inner, outer = _resolved(inner), _resolved(outer)
    around = [inner, *inner.parents]
    return outer in around or _inode(outer) in {_inode(path) for path in around} - {None}


def _inode(path: Path) -> tuple[int, int] | None:
    """None where nothing is, or the file system has no inodes."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


def _link_into(target: Path, source: Path) -> Path | None:
    """The first link below a source that leads to something in the target: what is read there is removed in the end."""
    real = _resolved(target)
    links = (folder / name for folder, _, files in source.walk() for name in sorted(files) if (folder / name).is_symlink())
    return next((link for link in links if Path(os.path.realpath(link)).is_relative_to(real)), None)


def look(target: Path, *, rule: Rule | None) -> Present | None:
    """What is at a target now; None where nothing is. Raises UserError unless it may be replaced: an empty directory, or what
    `rule` lets go."""
    if not os.path.lexists(target):
        return None
    if target.is_symlink() or not target.is_dir():
        kind = "link" if target.is_symlink() else "file"
        raise UserError(f"`{target}` is a {kind}, not a directory", hint="choose another place")
    if _is_mount_point(target):
        raise UserError(
            f"`{target}` is a mount point, which no other directory can take the place of",
            hint=f"an output is made beside its place and renamed: give a directory inside, such as `{target / 'model'}`",
        )
    if rule is None:
        raise already_exists(target, more=_WHOLE)
    found = present(target)
    if found and found.entries:
        rule(found)
    return found


def present(target: Path) -> Present | None:
    """Everything below a directory, links not followed; None where there is none. Raises OSError for what cannot be listed."""
    if not os.path.lexists(target):
        return None
    if target.is_symlink() or not target.is_dir():
        return Present(str(target), {}, "no directory")
    entries: dict[str, object] = {}
    for folder, folders, files in target.walk(on_error=_refuse):
        inside = folder.relative_to(target)
        if not folders and not files and folder != target:
            entries[f"{inside}/"] = "empty"
        for name in files:
            path = folder / name
            status = path.lstat()
            entries[f"{inside / name}{_kind(path, status)}"] = (status.st_ino, status.st_size, status.st_mtime_ns)
    status = target.stat()
    return Present(str(target), entries, (status.st_dev, status.st_ino), lambda name: (target / name).read_bytes())


def _kind(path: Path, status: os.stat_result) -> str:
    """What is added to the name of what is no file."""
    if S_ISLNK(status.st_mode):
        return f" -> {path.readlink()}"
    return "" if S_ISREG(status.st_mode) else " (no file)"


def _refuse(error: OSError) -> None:
    raise error


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (RuntimeError, ValueError):
        raise UserError(f"`{path}` leads nowhere: its links lead in a circle, or it holds a null byte") from None


def _is_mount_point(directory: Path) -> bool:
    """`ismount` compares devices, so it does not see a directory of the same file system that is bound there; the kernel's list
    has that too."""
    return os.path.ismount(directory) or str(_resolved(directory)) in _mount_points()


def _mount_points() -> set[str]:
    """By Linux's list; nothing where there is none. Blanks and backslashes in it are octal numbers (proc(5))."""
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line.split(" ")[4]) for line in lines}
