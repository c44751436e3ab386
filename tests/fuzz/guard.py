"""What an input may never do, watched while a reader runs: leave its folder, run code, take memory, or take time.

Opens, listings, imports, processes and sockets are seen by Python's audit hook; asking whether a file exists is not. Memory is
how far the process's high-water mark, set back before each input, rose; and an allocation beyond a limit on the address space
is seen as a MemoryError however deep it was caught.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import converter.families
from formats.errors import UserError

SECONDS = 2.0
MEMORY = 64 << 20
"""More than an input of 256 KiB may cost: what the project promises for a whole conversion."""

_ADDRESSES = 1 << 30

_HARMLESS = {
    "object.__getattr__", "object.__setattr__", "sys._getframe", "builtins.id", "mmap.__new__", "glob.glob", "glob.glob/2",
    "os.walk", "array.__new__",
}  # fmt: skip
_OWN_MEMORY = "/proc/self/status"  # what a dry run counts from
_LISTINGS = {"os.listdir", "os.scandir", "pathlib.Path.glob", "pathlib.Path.rglob", "pathlib.Path.walk"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


_FAMILIES = converter.families.names()


class Escaped(BaseException):
    """A reader did what no reader may do."""


class TooSlow(BaseException):
    """A reader took longer than `SECONDS`."""


class _Watch:
    """The audit hook: it cannot be removed, so it is asleep most of the time."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or event in _HARMLESS or self._allowed(event, arguments):
            return
        self.seen.append(f"{event} {str(arguments)[:200]}")
        raise Escaped(self.seen[-1])

    def _allowed(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            return isinstance(path, int) or path == _OWN_MEMORY or (not flags & _WRITES and self._inside(path))
        return event in _LISTINGS and self._inside(arguments[0], *converter.families.__path__)

    def _inside(self, path: Any, *others: str) -> bool:
        named = os.fspath(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        named = os.path.normpath(os.path.join(os.sep, named.decode() if isinstance(named, bytes) else named))  # noqa: PTH118
        return any(named == root or named.startswith(root + os.sep) for root in (self.folder or "", *others))


_WATCH = _Watch()
_installed: list[bool] = []


def _import_families() -> None:
    """Import every family: a reading that is the first to need one would. Other tests put their own in the place of some."""
    for name in _FAMILIES:
        if f"converter.families.{name}" not in sys.modules:
            converter.families.find(name)


@contextmanager
def watched(folder: Path) -> Generator[None]:
    """Escaped is raised, here at the latest, if code in the block leaves the folder or would run something."""
    _import_families()
    if not _installed:
        sys.addaudithook(_WATCH)
        _installed.append(True)
    _WATCH.seen.clear()
    _WATCH.folder = str(folder)
    try:
        yield
    finally:
        _WATCH.folder = None
    if _WATCH.seen:
        raise Escaped(_WATCH.seen[0])


@contextmanager
def timed(seconds: float = SECONDS) -> Generator[None]:
    """TooSlow is raised if the block takes more processor time; code that never lets Python's signals in, or waits for what does
    not come, ends the process after a while."""

    def late(*_arguments: Any) -> None:
        raise TooSlow(f"{seconds} s")

    previous = signal.signal(signal.SIGPROF, late)
    faulthandler.dump_traceback_later(300 * seconds, exit=True)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, previous)


@contextmanager
def limited() -> Generator[None]:
    """At most a gibibyte of addresses more than there are now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ADDRESSES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _highest() -> int:
    """The most memory this process had since the mark was set back, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refusal(act: Callable[[], Any], folder: Path) -> tuple[Any, UserError | None, int]:
    """What reading gives, the UserError it was refused with, and the bytes it took; anything else escapes, as does a reading
    that takes too much."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the mark becomes what there is now
    before = _highest()
    result, refused = _once(act, folder)
    taken = _highest() - before
    if taken > MEMORY:
        raise MemoryError(f"{taken >> 20} MiB")
    return result, refused, taken


def _once(act: Callable[[], Any], folder: Path) -> tuple[Any, UserError | None]:
    try:
        with timed(), watched(folder):
            return act(), None
    except UserError as error:
        _check_cause(error)
        str(error).encode(errors="backslashreplace")
        return None, error


def _check_cause(error: BaseException | None) -> None:
    while error:
        if isinstance(error, MemoryError):
            raise error
        error = error.__cause__ or error.__context__


def where(error: BaseException) -> str:
    """An error's kind and the line of the project it came from: two findings that agree in it are one."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/formats/" in f.filename or "/converter/" in f.filename]
    location = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the check"
    return f"{type(error).__name__} at {location}"
