"""Open files, whole reads and writes at positions, and errors a user can act on.

Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from formats.errors import TransientError, UserError

BLOCK = 4096
"""What direct I/O is aligned to: a page, and no smaller than any disk's sector."""


class Files:
    """Open file descriptors by path, shared by threads, closed together: at the latest when nobody holds them any more."""

    def __init__(self, flags: int = os.O_RDONLY) -> None:
        self._flags = flags | os.O_CLOEXEC
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                if self._flags & os.O_CREAT:
                    path.parent.mkdir(parents=True, exist_ok=True)
                self._open[path] = os.open(path, self._flags, 0o644)
            return self._open[path]

    def sync(self) -> None:
        """Get everything written so far onto the disk."""
        with self._lock:
            descriptors = list(self._open.values())
        for descriptor in descriptors:
            os.fsync(descriptor)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def __del__(self) -> None:
        self.close()


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def read_exactly(descriptor: int, out: memoryview, offset: int, *, path: Path, least: int | None = None) -> None:
    """Fill `out` from `offset`, or at least its first `least` bytes; a file that ends before is an error that names it."""
    least, done = len(out) if least is None else least, 0
    while done < least:
        try:
            count = os.preadv(descriptor, [out[done:]], offset + done)
        except OSError as error:
            error.filename = str(path)  # else it would look like one of what is being written
            raise
        if count == 0:
            raise UserError(
                f"`{path.name}` ends at byte {offset + done}, but its header promises data up to {offset + least}",
                hint="the file is truncated or still being written; fetch it again",
            )
        done += count


_FULL = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
}


@contextmanager
def explained(path: Path | None = None) -> Generator[None]:
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
        raise UserError(f"cannot use {named}: {error.strerror or error}") from error


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
