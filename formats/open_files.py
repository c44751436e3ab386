"""Limit the open file descriptors of the process: the least recently used are closed first.

A descriptor is lent for the length of a `with` block and is not closed while a thread uses it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from formats.errors import UserError

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None

MOST_OPEN = 128
"""Limit of descriptors for all `Files` of this process. A checkpoint of hundreds of ranks has hundreds of files."""

_Stamp = tuple[int, int]


def most_open() -> int:
    """Return the limit: `MOST_OPEN`, or half of the process's limit if that is less, because the program needs others too."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    return MOST_OPEN if soft < 0 else max(1, min(MOST_OPEN, soft // 2))


class Files:
    """Files opened with the same `flags`, shared by threads and closed together, at the latest on garbage collection.

    A file whose descriptor was closed meanwhile is opened again. A written file is synced before its descriptor is closed.
    """

    def __init__(self, flags: int = os.O_RDONLY) -> None:
        self._owner = _Owner(flags | os.O_CLOEXEC)

    def using(self, path: Path, flags: int = 0) -> _Lease:
        """Return a context manager that lends the descriptor of `path`, opened with further `flags`.

        A thread may borrow one at a time, and may block until another thread returns one. Raises UserError if a reopened file
        has changed, and the OSError of an earlier failed sync.
        """
        return _Lease(self._owner, path, flags)

    def sync(self) -> None:
        """Sync all written files. Raises the OSError of the first failed sync, on every call."""
        _OPEN.sync(self._owner)

    def check(self) -> None:
        """Raise the OSError of a failed sync, if any. Syncs nothing."""
        self._owner.raise_failure()

    def close(self) -> None:
        """Close all unused descriptors, and the others as soon as they are returned."""
        _OPEN.close(self._owner)

    def __del__(self) -> None:
        _OPEN.close_later(self._owner)


@dataclass(slots=True, eq=False)
class _Owner:
    """The state of one `Files`. `known`: size and modification time of each file when it was first opened; None if written."""

    flags: int
    known: dict[Path, _Stamp | None] = field(default_factory=dict[Path, "_Stamp | None"])
    closing: int = 0
    failure: OSError | None = None
    writes: bool = field(init=False)

    def __post_init__(self) -> None:
        self.writes = bool(self.flags & (os.O_WRONLY | os.O_RDWR))

    def raise_failure(self) -> None:
        if self.failure:
            raise self.failure


_Key = tuple[_Owner, Path, int]


@dataclass(slots=True, eq=False)
class _Open:
    """An open descriptor: the number of threads that use it, and whether it needs a sync."""

    key: _Key
    descriptor: int
    users: int = 0
    dirty: bool = False
    unwanted: bool = False


class _Lease:
    """See `Files.using`."""

    __slots__ = ("_key", "_open")

    def __init__(self, owner: _Owner, path: Path, flags: int) -> None:
        self._key = owner, path, flags

    def __enter__(self) -> int:
        self._open = _OPEN.borrow(self._key)
        return self._open.descriptor

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _OPEN.give_back(self._open)


class _OpenFiles:
    """All open descriptors of the process, the least recently used first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._open: OrderedDict[_Key, _Open] = OrderedDict()
        self._count = 0  # also those that are being closed
        self._abandoned: deque[_Owner] = deque()

    def borrow(self, key: _Key) -> _Open:
        """Lend the descriptor, opening the file if needed; blocks while the limit is in use."""
        owner, *_ = key
        with self._lock:
            self._close_abandoned()
            owner.raise_failure()
            while key not in self._open:
                if self._count < most_open() and self._try_to_open(key):
                    break
                self._make_room()
                owner.raise_failure()
            file = self._open[key]
            self._open.move_to_end(key)
            file.users += 1
            file.dirty = file.dirty or owner.writes
            return file

    def give_back(self, file: _Open) -> None:
        """Return a lent descriptor. A sync during the loan may have missed later writes, so another one is needed."""
        owner, *_ = file.key
        with self._lock:
            file.dirty = owner.writes
            self._release(file)

    def sync(self, owner: _Owner) -> None:
        with self._lock:
            dirty = [file for key, file in self._open.items() if key[0] is owner and file.dirty]
        for file in dirty:
            self._sync_open(file)
        with self._changed:
            self._changed.wait_for(lambda: not owner.closing)
            owner.raise_failure()

    def close(self, owner: _Owner) -> None:
        with self._lock:
            self._close_abandoned()
            self._drop(owner)
            self._changed.notify_all()

    def close_later(self, owner: _Owner) -> None:
        """Close from a finalizer, which may interrupt any method here: in that case the next call closes."""
        self._abandoned.append(owner)
        if self._lock.acquire(blocking=False):
            try:
                self._close_abandoned()
            finally:
                self._lock.release()

    def before_fork(self) -> None:
        self._lock.acquire()

    def after_fork(self) -> None:
        self._lock.release()

    def _sync_open(self, file: _Open) -> None:
        with self._lock:
            if self._open.get(file.key) is not file:
                return  # closed meanwhile, hence synced
            file.users += 1
            file.dirty = False
        try:
            _sync(file)
        finally:
            with self._lock:
                self._release(file)

    def _release(self, file: _Open) -> None:
        file.users -= 1
        if file.unwanted and not file.users:
            self._close(file)
        self._changed.notify_all()

    def _close_abandoned(self) -> None:
        while self._abandoned:
            self._drop(self._abandoned.popleft())

    def _drop(self, owner: _Owner) -> None:
        owner.known.clear()
        for key in [key for key in self._open if key[0] is owner]:
            file = self._open.pop(key)
            file.unwanted = True
            if not file.users:
                self._close(file)

    def _try_to_open(self, key: _Key) -> bool:
        """Open a file; False if the process is out of descriptors and could close others."""
        try:
            self._open[key] = _Open(key, _descriptor(*key))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._open:
                return False
            raise
        self._count += 1
        return True

    def _make_room(self) -> None:
        """Close the least recently used descriptor, preferably one that needs no sync; block if all are in use."""
        idle = [file for file in self._open.values() if not file.users]
        if not idle:
            self._changed.wait()
            return
        oldest = next((file for file in idle if not file.dirty), idle[0])
        del self._open[oldest.key]
        if oldest.dirty:
            self._without_lock(oldest, lambda: _sync(oldest))
        self._close(oldest)
        self._changed.notify_all()

    def _without_lock(self, file: _Open, act: Callable[[], None]) -> None:
        owner, *_ = file.key
        owner.closing += 1
        self._lock.release()
        try:
            act()
        finally:
            self._lock.acquire()
            owner.closing -= 1

    def _close(self, file: _Open) -> None:
        self._count -= 1
        with suppress(OSError):  # written data was synced before, so a failed close loses nothing
            os.close(file.descriptor)


def _sync(file: _Open) -> None:
    """Sync a file, and record a failure for every later call of its owner.

    This may run on a thread of another owner, and the system reports a lost write only once.
    """
    owner, path, _ = file.key
    try:
        os.fsync(file.descriptor)
    except OSError as error:
        error.filename = str(path)
        owner.failure = owner.failure or error


def _descriptor(owner: _Owner, path: Path, flags: int) -> int:
    """Open a file. A reopened one must still exist, and must be unchanged if it is read."""
    flags |= owner.flags
    if path in owner.known:
        flags &= ~os.O_CREAT
    elif flags & os.O_CREAT:
        path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, flags, 0o666)  # the umask decides, as for any program
    try:
        _check_unchanged(owner, path, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_unchanged(owner: _Owner, path: Path, descriptor: int) -> None:
    status = os.fstat(descriptor)
    stamp = None if owner.writes else (status.st_size, status.st_mtime_ns)
    if owner.known.setdefault(path, stamp) != stamp:
        raise UserError(f"`{path}` changed while it was being read", hint="run it again once nothing is writing to it")


_OPEN = _OpenFiles()
if hasattr(os, "register_at_fork"):  # in a forked child no thread would release the lock
    os.register_at_fork(before=_OPEN.before_fork, after_in_parent=_OPEN.after_fork, after_in_child=_OPEN.after_fork)
