"""Whole reads and writes at positions, direct I/O where there is any, and errors a user can act on.

Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from formats.errors import TransientError, UserError
from formats.faults import fault

_MOST_AT_ONCE = 1 << 30  # macOS refuses reads and writes of 2 GiB
_ALIGNMENT = 4096  # no disk has larger sectors


def io_alignment() -> int:
    """What direct I/O is aligned to, in bytes: whole pages of this machine's memory.

    Smaller blocks would let direct I/O and the page cache change parts of the same page.
    """
    return max(_ALIGNMENT, mmap.PAGESIZE)


def direct_flag() -> int:
    """What opens a file for direct I/O; 0 on systems that have none."""
    return getattr(os, "O_DIRECT", 0)


def refuses_direct(error: OSError) -> bool:
    """Does a file system say so that it has no direct I/O, or wants it aligned otherwise?"""
    return error.errno in (errno.EINVAL, errno.EOPNOTSUPP)


def forget(descriptor: int, offset: int, length: int) -> None:
    """Tell the system that it need not keep these bytes of a file in memory, where it can be told so."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + _MOST_AT_ONCE], offset + done)


def read_exactly(descriptor: int, out: memoryview, offset: int, *, path: Path, least: int | None = None) -> None:
    """Fill `out` from `offset`, or at least its first `least` bytes; a file that ends before is an error that names it."""
    least, done = len(out) if least is None else least, 0
    while done < least:
        try:
            count = _read(descriptor, out[done : done + _MOST_AT_ONCE], offset + done)
        except OSError as error:
            error.filename = str(path)  # else it would look like one of what is being written
            raise
        if count == 0:
            raise UserError(
                f"`{path.name}` ends at byte {offset + done}, but its header promises data up to {offset + least}",
                hint="the file is truncated or still being written; fetch it again",
            )
        done += count


def _read(descriptor: int, out: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [out], offset)
    data = os.pread(descriptor, len(out), offset)
    out[: len(data)] = data
    return len(data)


_FULL = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
}


_HINTS = {errno.EMFILE: "raise the limit on open files (`ulimit -n`)"}


@contextmanager
def user_errors(path: Path | None = None) -> Generator[None]:
    """Turn what a full, read-only or broken disk says into errors that name the place and the way out.

    `path`: where was being written.
    """
    try:
        yield
    except OSError as error:
        if path and error.errno in _FULL:
            raise TransientError(
                f"no room left for `{path}`: {error.strerror} ({free_space(path)})",
                hint=f"{_FULL[error.errno]}, then go on with `--resume`; nothing readable was left there",
            ) from error
        named = f"`{error.filename or path}`" if error.filename or path else "a file"
        raise UserError(f"cannot use {named}: {fault(error)}", hint=_HINTS.get(error.errno or 0, "")) from error


def free_bytes(path: Path) -> int | None:
    """Bytes an ordinary user may still write below `path`, which need not exist yet; None where the file system does not tell:
    some that lie in user space or on a network answer that they have no blocks at all."""
    while not path.exists() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def free_space(path: Path) -> str:
    """The same for messages."""
    free = free_bytes(path)
    return "free space unknown" if free is None else f"{free / 1e9:.1f} GB free"
