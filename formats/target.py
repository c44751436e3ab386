"""Check the directory that an output is written to: what must not be harmed, and what it contains now."""

from __future__ import annotations

import os
import re
from pathlib import Path
from stat import S_ISLNK, S_ISREG

from formats.errors import UserError
from formats.replacement import Present, Rule, already_exists

_MOUNTS = Path("/proc/self/mountinfo")
_COMPLETE = "; outputs appear only when they are complete, so this one needs no `--resume`"


def check_target(target: Path, *sources: Path, rule: Rule | None) -> None:
    """Raise UserError for a target that must not or cannot be written: inside a source or around it, a mount point, or existing
    content that `rule` refuses (without a rule: any content)."""
    if target.name in ("", ".."):
        raise UserError(
            f"`{target}` does not end in a directory name",
            hint="the output is first written beside it: give the directory's name",
        )
    for source in sources:
        if relation := _relation(target, source):
            raise UserError(f"`{target}` {relation} the source `{source}`", hint="choose another place")
        if target.is_dir() and (link := _link_into(target, source)):
            raise UserError(
                f"`{link}` of the source is a link into `{target}`, which would be replaced", hint="choose another place"
            )
    look(target, rule=rule)


def _relation(target: Path, source: Path) -> str:
    """Return how a target overlaps a source, in words; empty if it does not."""
    inside, around = _is_within(target, source), _is_within(source, target)
    return "is" if inside and around else "is inside" if inside else "contains" if around else ""


def _is_within(inner: Path, outer: Path) -> bool:
    """Is a path the same as another or below it? A directory that is mounted twice has two paths and one inode."""
    inner, outer = _resolved(inner), _resolved(outer)
    around = [inner, *inner.parents]
    return outer in around or _inode(outer) in {_inode(path) for path in around} - {None}


def _inode(path: Path) -> tuple[int, int] | None:
    """Return device and inode; None for a missing path and on file systems without inodes."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


def _link_into(target: Path, source: Path) -> Path | None:
    """Return the first link below a source that points into the target, which the run would remove."""
    real = _resolved(target)
    links = (folder / name for folder, _, files in source.walk() for name in sorted(files) if (folder / name).is_symlink())
    return next((link for link in links if Path(os.path.realpath(link)).is_relative_to(real)), None)


def look(target: Path, *, rule: Rule | None) -> Present | None:
    """Return the content of a target, None if it does not exist. Raises UserError unless it may be replaced: an empty directory,
    or content that `rule` allows."""
    if not os.path.lexists(target):
        return None
    if target.is_symlink() or not target.is_dir():
        kind = "link" if target.is_symlink() else "file"
        raise UserError(f"`{target}` is a {kind}, not a directory", hint="choose another place")
    if _is_mount_point(target):
        raise UserError(
            f"`{target}` is a mount point, which cannot be replaced by a rename",
            hint=f"the output is written beside it and renamed: give a directory inside, such as `{target / 'model'}`",
        )
    if rule is None:
        raise already_exists(target, more=_COMPLETE)
    content = present(target)
    if content and content.entries:
        rule(content)
    return content


def present(target: Path) -> Present | None:
    """Return everything below a directory, links not followed; None if it does not exist. Raises OSError if listing fails."""
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
    """Return the note after the name of an entry that is no regular file."""
    if S_ISLNK(status.st_mode):
        return f" -> {path.readlink()}"
    return "" if S_ISREG(status.st_mode) else " (no file)"


def _refuse(error: OSError) -> None:
    raise error


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (RuntimeError, ValueError):
        raise UserError(f"`{path}` cannot be resolved: its links form a circle, or it holds a null byte") from None


def _is_mount_point(directory: Path) -> bool:
    """Is it a mount point? `ismount` compares devices and misses bind mounts of the same file system, which Linux lists."""
    return os.path.ismount(directory) or str(_resolved(directory)) in _mount_points()


def _mount_points() -> set[str]:
    """Return the mount points that Linux lists; empty elsewhere. Blanks and backslashes are octal escapes (proc(5))."""
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), line.split(" ")[4]) for line in lines}
