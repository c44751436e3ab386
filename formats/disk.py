"""Complete reads and writes at byte offsets, direct I/O where it is available, and errors a user can act on."""

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
    """Return the alignment of direct I/O in bytes: at least a memory page.

    With smaller blocks, direct I/O and the page cache could change parts of the same page.
    """
    return max(_ALIGNMENT, mmap.PAGESIZE)


def direct_flag() -> int:
    """Return the flag that opens a file for direct I/O; 0 on systems without it."""
    return getattr(os, "O_DIRECT", 0)


def refuses_direct(error: OSError) -> bool:
    """Return whether the error means that the file system has no direct I/O, or requires another alignment."""
    return error.errno in (errno.EINVAL, errno.EOPNOTSUPP)


def forget(descriptor: int, offset: int, length: int) -> None:
    """Drop bytes of a file from the page cache, where the system supports that."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + _MOST_AT_ONCE], offset + done)


def read_exactly(descriptor: int, out: memoryview, offset: int, *, path: Path, least: int | None = None) -> None:
    """Read into `out` from `offset`, at least `least` bytes (default: all). Raises UserError for a file that ends before."""
    least, done = len(out) if least is None else least, 0
    while done < least:
        try:
            count = _read(descriptor, out[done : done + _MOST_AT_ONCE], offset + done)
        except OSError as error:
            error.filename = str(path)  # the caller may be writing other files at the same time
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
    """Turn OSError of a full, read-only or broken disk into a UserError that names the path and what to do.

    `path`: the output being written.
    """
    try:
        yield
    except OSError as error:
        if path and error.errno in _FULL:
            raise TransientError(
                f"no room left for `{path}`: {error.strerror} ({free_space(path)})",
                hint=f"{_FULL[error.errno]}, then continue with `--resume`; nothing readable was left at the target",
            ) from error
        named = f"`{error.filename or path}`" if error.filename or path else "a file"
        raise UserError(f"cannot use {named}: {fault(error)}", hint=_HINTS.get(error.errno or 0, "")) from error


def free_bytes(path: Path) -> int | None:
    """Return the free bytes for ordinary users on the file system of `path`, which need not exist yet.

    None where they are unknown: some network and user-space file systems report zero blocks.
    """
    while not path.exists() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def free_space(path: Path) -> str:
    """Return the free space as text for messages."""
    free = free_bytes(path)
    return "free space unknown" if free is None else f"{free / 1e9:.1f} GB free"
