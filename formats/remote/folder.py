"""A directory by its URL: `hf://org/name[@revision]`, `s3://`, `gs://`, `http(s)://`.

Files are read by byte range, nothing is kept on disk. The version of a file is recorded when it is first requested, and every
later read is checked against it. The protocols are left to the stores.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from formats.errors import UserError
from formats.folder import NOT_OF_THE_MODEL, Folder, whole
from formats.remote.gcs import GoogleStorage
from formats.remote.hub import Hub
from formats.remote.retry import RetryableError, RetryPolicy, retry
from formats.remote.s3 import S3
from formats.remote.store import Status, Store, file_name
from formats.remote.web import Web

_STORES: Mapping[str, Callable[[str, RetryPolicy], Store]] = {
    "hf": Hub, "s3": S3, "gs": GoogleStorage, "http": Web, "https": Web,
}  # fmt: skip
_BLOCK = 64 << 10
_BLOCKS = 64
_SMALL = 16 << 10
"""Shorter reads are served from cached blocks: the parts of a torch archive are close together, and every request costs a round
trip."""


def open_remote(url: str, *, policy: RetryPolicy | None = None, probe: Sequence[str] = ()) -> Folder:
    """Open the folder of a URL; see `formats.location.open_folder`."""
    kind = url.partition("://")[0].lower()
    if kind not in _STORES:
        raise UserError(f"`{kind}://` is not supported", hint=f"known are {', '.join(f'{name}://' for name in _STORES)}")
    policy, make = policy or RetryPolicy(), _STORES[kind]
    store = Web(url, policy, probe=probe) if make is Web else make(url, policy)
    return RemoteFolder(_CachedStore(store, policy), "")


class _CachedStore:
    """A store with retries, cached blocks, and the status of every requested file."""

    def __init__(self, store: Store, policy: RetryPolicy) -> None:
        self.store = store
        self._policy = policy
        self._statuses: dict[str, Status | None] = {}
        self._listed: dict[str, list[str]] = {}
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def status(self, path: str) -> Status | None:
        if path not in self._statuses:
            self._remember({path: self._retry(lambda: self.store.status(path), f"looking at `{file_name(path)}`")})
        return self._statuses[path]

    def existing(self, path: str) -> Status:
        status = self.status(path)
        if status is None:
            raise UserError(f"`{self.store.label}` has no `{path}`")
        return status

    def files(self, prefix: str) -> list[str]:
        if prefix not in self._listed:
            statuses = self._retry(lambda: self.store.files(prefix), f"listing `{self.store.label}`")
            self._remember({path: status for path, status in statuses.items() if status})
            self._listed[prefix] = sorted(statuses)
        return self._listed[prefix]

    def children(self, prefix: str) -> list[str]:
        return self._retry(lambda: self.store.children(prefix), f"listing `{self.store.label}`")

    def read(self, path: str, offset: int, out: memoryview) -> None:
        status = self.existing(path)
        if offset + len(out) > status.size:
            raise UserError(
                f"`{file_name(path)}` ends at byte {status.size}, but its header promises data up to {offset + len(out)}",
                hint="the file is truncated or still being written; fetch it again",
            )
        if len(out) < _SMALL < status.size:
            self._from_blocks(path, status, offset, out)
        elif out:
            self._read(path, status, offset, out)

    def _from_blocks(self, path: str, status: Status, offset: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            number, start = divmod(offset + done, _BLOCK)
            piece = self._block(path, status, number)[start : start + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)

    def _block(self, path: str, status: Status, number: int) -> bytes:
        with self._lock:
            if (path, number) in self._blocks:
                self._blocks.move_to_end((path, number))
                return self._blocks[path, number]
        data = bytearray(min(_BLOCK, status.size - number * _BLOCK))
        self._read(path, status, number * _BLOCK, memoryview(data))
        with self._lock:
            self._blocks[path, number] = bytes(data)
            if len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)
        return bytes(data)

    def _read(self, path: str, status: Status, offset: int, out: memoryview) -> None:
        """Read a range; each attempt continues where the last one failed."""
        done = 0

        def attempt() -> None:
            nonlocal done
            try:
                self.store.fetch(path, status, offset + done, out[done:])
            except RetryableError as error:
                done += error.done
                if done < len(out):
                    raise

        self._retry(attempt, f"reading `{file_name(path)}` from byte {offset} to {offset + len(out)}")

    def _remember(self, statuses: Mapping[str, Status | None]) -> None:
        """Record statuses; the first one of a file is kept."""
        with self._lock:
            for path, status in statuses.items():
                self._statuses.setdefault(path, status)

    def _retry[Result](self, attempt: Callable[[], Result], doing: str) -> Result:
        return retry(attempt, self._policy, doing=doing)


class RemoteFolder:
    """A directory in a store. Sub-folders share its connections and its cache."""

    def __init__(self, opened: _CachedStore, prefix: str) -> None:
        self._store = opened
        self._prefix = prefix

    @property
    def label(self) -> str:
        root = self._store.store.label
        return f"{root}/{self._prefix[:-1]}" if self._prefix else root

    @property
    def name(self) -> str:
        return file_name(self._prefix[:-1]) or self._store.store.name

    @property
    def origin(self) -> Mapping[str, str]:
        return self._store.store.origin or {"name": self.name}

    def has(self, name: str) -> bool:
        return self._store.status(self._prefix + name) is not None

    def size(self, name: str) -> int:
        return self._store.existing(self._prefix + name).size

    def version(self, name: str) -> str:
        return str(self._store.existing(self._prefix + name))

    def sha256(self, name: str) -> str | None:
        return self._store.existing(self._prefix + name).sha256

    def children(self) -> list[str]:
        return self._store.children(self._prefix)

    def files(self) -> list[str]:
        names = (path.removeprefix(self._prefix) for path in self._store.files(self._prefix))
        return sorted({_closed(name) for name in names})

    def get(self, name: str) -> bytes:
        return whole(self, name)

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        self._store.read(self._prefix + name, offset, out)

    def changed(self) -> str:
        """Return nothing: a read of another version than the first fails by itself."""
        return ""

    def below(self, name: str) -> RemoteFolder:
        return RemoteFolder(self._store, f"{self._prefix}{name.strip('/')}/")

    def close(self) -> None:
        """Close the connections, also of sub-folders, which open new ones if they are used again."""
        self._store.store.close()


def _closed(name: str) -> str:
    """Return a file's name, or the folder around it that is not searched."""
    parts = name.split("/")
    for depth, part in enumerate(parts[:-1], 1):
        if part in NOT_OF_THE_MODEL:
            return "/".join(parts[:depth]) + "/"
    return name
