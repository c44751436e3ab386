"""Write a directory to S3 or Google Cloud Storage, `s3://…` or `gs://…`. None of it can be read before `commit`.

Files are uploaded in parts while they are written, each in order, several at once. `commit` turns the parts into objects: first
those that do not make a checkpoint recognizable, then, one by one, those that mark it complete.

Guaranteed: a reader finds at any moment the previous content, no checkpoint, or the complete new one; a run that fails leaves
none of its objects; parts arrive as they were sent. Not guaranteed, because object storage has no rename: where
something is replaced, between the start of `commit` and its end there is neither the old checkpoint nor the new one (seconds; for
good if the run fails just then); a reader in the middle of the old one finds files gone or changed; two runs to one URL at once
are found out only if one has committed by the time the other does, which then changes nothing. A killed run leaves parts that
nobody sees and the owner of the bucket pays for: a lifecycle rule that drops unfinished uploads is the remedy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from mmap import mmap
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlsplit

from formats.errors import UserError
from formats.remote.gcs import GoogleStorage
from formats.remote.part_memory import PART_BYTES, PART_MEMORY, MemoryPart, Part, PartMemory
from formats.remote.retry import RetryPolicy, retry
from formats.remote.s3 import S3
from formats.remote.store import Status, Store, file_name
from formats.replacement import Present, Rule, already_exists, check_unchanged

_MOST_PARTS = 9_000  # 10,000 is the limit of both services
_WHOLE = 256 << 10  # smaller files are kept until `commit`, and go up whole
_MOST_KEPT = 8 << 20  # of these, together; further ones go up as files of one part


class Target(Store, Protocol):
    """A store that can be written in parts. Each call is one attempt."""

    def begin(self, path: str) -> str: ...
    def part(self, path: str, upload: str, number: int, data: mmap) -> str: ...
    def finish(self, path: str, upload: str, tags: Sequence[str]) -> bool: ...
    def drop(self, path: str, upload: str) -> None: ...
    def put(self, path: str, data: bytes) -> None: ...
    def delete(self, path: str) -> None: ...


TARGETS: Mapping[str, Callable[[str, RetryPolicy], Target]] = {"s3": S3, "gs": GoogleStorage}


def exists(url: str, *, policy: RetryPolicy | None = None) -> bool:
    """Return whether any object exists below that URL."""
    target = _RetryingTarget(url, policy or RetryPolicy())
    try:
        return bool(target.children())
    finally:
        target.target.close()


class Upload:
    """An upload of files to `url`, as a context manager: what was not committed by the end of the block is removed.

    Memory: the parts of all files together hold at most `memory` bytes, and one that was filled on disk comes on top while it is
    sent (formats/remote/part_memory.py). A part is 8 MiB, or a nine-thousandth of the file if that is more.
    Raises UserError if there is something at `url`, unless `rule` lets all of it go; what is at a bucket's root never goes.
    """

    def __init__(
        self,
        url: str,
        *,
        rule: Rule | None = None,
        streams: int = 8,
        memory: int = PART_MEMORY,
        policy: RetryPolicy | None = None,
    ) -> None:
        self._target = _RetryingTarget(url, policy or RetryPolicy())
        self._rule, self._is_root = rule, not urlsplit(url).path.strip("/")
        self._files: dict[str, FileUpload] = {}
        self._published: list[str] = []
        self._standing: set[str] = set()
        self._record = ""
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(streams, thread_name_prefix="upload")
        self._room = threading.BoundedSemaphore(streams)
        self._memory = PartMemory(memory)
        self._kept = 0
        self._failure: BaseException | None = None
        try:
            self._before = self._look() if self._target.children() else None
        except BaseException:
            self.abort()
            raise

    @property
    def label(self) -> str:
        return self._target.target.label

    @property
    def held(self) -> int:
        """Bytes of all parts in memory."""
        return self._memory.held

    def open(self, name: str, size: int) -> FileUpload:
        """Start a file of that size, which is written from its first byte to its last."""
        with self._lock:
            assert name not in self._files, f"{name} was opened before"
            keep = size <= _WHOLE and self._kept + size <= _MOST_KEPT
            self._kept += size if keep else 0
            sink = FileUpload(self._target, name, size, self._send, None if keep else self._memory)
            self._files[name] = sink
        return sink

    def put(self, name: str, data: bytes) -> None:
        """Upload a complete file."""
        sink = self.open(name, len(data))
        sink.update(memoryview(data))
        sink.close()

    def commit(self, order: Sequence[str], *, record: str = "") -> None:
        """Make all files readable. Those in `order` come last, one by one: there belongs whatever says that the checkpoint is
        whole (`.metadata`, then trackers; an index, then `config.json`). The `record`, which says what belongs to the output,
        comes first, and an old one of that file name goes last: so a run that ends meanwhile leaves nothing that another may not
        replace.

        What was there goes first: the old files of the names in `order`, then all that are not replaced. Raises
        TransientError, with all of it in place, if it is not what was there at the start.
        """
        assert set(order) <= set(self._files), "order names files that were not opened"
        for sink in self._files.values():
            sink.wait()
        before = self._target.listed()
        check_unchanged(self._before, self._present(before) if before else None, then="run it again")
        self._standing, self._record = set(before), record
        self._make_room(before, order)
        publish = partial(self._publish, before)
        if record:
            publish(record)
        list(self._pool.map(publish, [name for name in self._files if name not in {*order, record}]))
        for name in order:
            publish(name)
        self._files.clear()

    def abort(self) -> None:
        """Take everything back: parts, and objects that a failed `commit` had made, the last first. What cannot be taken back
        is left, without complaint: the reason for all this says more. The record stays beside whatever is left. After a `commit`
        that succeeded, nothing happens."""
        self._pool.shutdown(cancel_futures=True)
        for name in reversed(self._published if self._files else []):
            if name != self._record or self._standing == {name}:
                with suppress(UserError):
                    self._remove(name)
        for sink in self._files.values():
            with suppress(UserError):
                sink.drop()
        self._files.clear()
        self._target.target.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()

    def _look(self) -> Present | None:
        """Return the current content, None if empty. Raises UserError unless all of it may be replaced."""
        if self._rule is None:
            raise already_exists(self.label)
        if self._is_root:
            raise UserError(
                f"`{self.label}` is a whole bucket, which `--overwrite` never replaces",
                hint=f"give a folder in it, such as `{self.label}/model`",
            )
        present = self._present(self._target.listed())
        if not present.entries:
            return None
        self._rule(present)
        return present

    def _present(self, listed: Mapping[str, Status]) -> Present:
        return Present(self.label, listed, read=lambda name: self._target.get(name, listed[name]))

    def _send(self, part: Part, call: Callable[[mmap], str]) -> Future[str]:
        """Run a call on the pool, as soon as one of its streams is free; raise what an earlier one raised."""
        if self._failure:
            raise self._failure
        self._memory.sending(part)
        self._room.acquire()
        future = self._pool.submit(part.send, call)
        future.add_done_callback(partial(self._sent, part))
        return future

    def _sent(self, part: Part, future: Future[str]) -> None:
        self._memory.sent(part)
        if not future.cancelled():
            self._failure = self._failure or future.exception()
        self._room.release()

    def _make_room(self, before: Mapping[str, Status], order: Sequence[str]) -> None:
        """Remove old objects, small ones first: files that mark a checkpoint complete are small."""
        for name in reversed(order):
            if name in before:
                self._remove(name)
        stale = sorted(before.keys() - self._files.keys(), key=lambda name: (before[name].size, name))
        records = [name for name in stale if self._record and file_name(name) == file_name(self._record)]
        list(self._pool.map(self._remove, [name for name in stale if name not in records]))
        for name in records:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._target.delete(name)
        self._standing.discard(name)

    def _publish(self, before: Mapping[str, Status], name: str) -> None:
        with self._lock:
            self._published.append(name)
            self._standing.add(name)
        self._files[name].publish(before.get(name))


Send = Callable[[Part, Callable[[mmap], str]], Future[str]]


class FileUpload:
    """A file on its way. `update` may be called from any thread, from one at a time. Its parts are made in `memory`; without
    one, it is kept whole until it is published."""

    def __init__(self, target: _RetryingTarget, name: str, size: int, send: Send, memory: PartMemory | None) -> None:
        self._target, self._name, self._size, self._send = target, name, size, send
        self._part_size = part_size(size)
        self._memory = memory
        self._part: Part | None = None
        self._filled = 0
        self._taken = 0
        self._upload = ""
        self._tags: list[Future[str]] = []

    def update(self, data: memoryview) -> None:
        """Copy the file's next bytes. Blocks while too much is being sent, and raises UserError if an earlier part failed."""
        data = data.cast("B") if data.nbytes else memoryview(b"")
        while data:
            size = min(self._part_size, self._size - self._taken + self._filled)
            assert size > self._filled, f"{self._name} should have {self._size} bytes, there are more"
            self._part = self._part or (self._memory.part(size) if self._memory else MemoryPart(size))
            count = min(len(data), size - self._filled)
            self._part.write(self._filled, data[:count])
            self._filled, self._taken, data = self._filled + count, self._taken + count, data[count:]
            if self._filled == self._part_size:
                self._flush(self._part)

    def close(self) -> None:
        """Finish the file's data. It cannot be read before `publish`."""
        assert self._taken == self._size, f"{self._name} has {self._taken} of {self._size} bytes"
        if self._part and self._memory:
            self._flush(self._part)

    def wait(self) -> None:
        """Block until every part was uploaded; UserError if one failed."""
        assert self._taken == self._size, f"{self._name} has {self._taken} of {self._size} bytes"
        for tag in self._tags:
            tag.result()

    def publish(self, before: Status | None) -> None:
        """Make the object, in place of the one that was there `before`."""
        if self._upload:
            self._target.finish(self._name, self._upload, [tag.result() for tag in self._tags], self._size, before)
        else:
            self._target.put(self._name, self._part.content() if isinstance(self._part, MemoryPart) else b"")
        self._upload = ""

    def drop(self) -> None:
        """Drop the parts that were sent."""
        if self._upload:
            self._target.drop(self._name, self._upload)

    def _flush(self, part: Part) -> None:
        self._upload = self._upload or self._target.begin(self._name)
        upload, number = self._upload, len(self._tags) + 1
        self._part, self._filled = None, 0
        self._tags.append(self._send(part, lambda data: self._target.part(self._name, upload, number, data)))


def part_size(size: int) -> int:
    """Return the bytes of a part of a file of that size: 8 MiB, or more where there would be too many parts for the services."""
    return max(PART_BYTES, -(-size // _MOST_PARTS // PART_BYTES) * PART_BYTES)


class _RetryingTarget:
    """The calls of a target, with retries."""

    def __init__(self, url: str, policy: RetryPolicy) -> None:
        kind = url.partition("://")[0].lower()
        if kind not in TARGETS:
            raise UserError(f"`{kind}://` cannot be written to", hint="a directory, s3:// and gs:// can")
        self.target = TARGETS[kind](url, policy)
        self._policy = policy

    def children(self) -> list[str]:
        return self._retry(lambda: self.target.children(""), "listing", "")

    def listed(self) -> dict[str, Status]:
        statuses = self._retry(lambda: self.target.files(""), "listing", "")
        whole = {path: status or self._status(path) for path, status in statuses.items()}
        return {path: status for path, status in whole.items() if status}

    def get(self, name: str, status: Status) -> bytes:
        out = bytearray(status.size)
        self._retry(lambda: self.target.fetch(name, status, 0, memoryview(out)), "reading", name)
        return bytes(out)

    def begin(self, name: str) -> str:
        return self._retry(lambda: self.target.begin(name), "writing", name)

    def part(self, name: str, upload: str, number: int, data: mmap) -> str:
        return self._retry(lambda: self.target.part(name, upload, number, data), f"writing part {number} of", name)

    def finish(self, name: str, upload: str, tags: Sequence[str], size: int, before: Status | None) -> None:
        """Complete an upload. If the response was lost, the upload no longer exists, but the object is new."""
        if self._retry(lambda: self.target.finish(name, upload, tags), "writing", name):
            return
        now = self._status(name)
        if now is None or now.size != size or now == before:
            raise UserError(f"the upload of `{name}` was dropped by somebody else", hint="run it again")

    def drop(self, name: str, upload: str) -> None:
        self._retry(lambda: self.target.drop(name, upload), "taking back", name)

    def put(self, name: str, data: bytes) -> None:
        self._retry(lambda: self.target.put(name, data), "writing", name)

    def delete(self, name: str) -> None:
        self._retry(lambda: self.target.delete(name), "removing", name)

    def _status(self, name: str) -> Status | None:
        return self._retry(lambda: self.target.status(name), "looking at", name)

    def _retry[Result](self, attempt: Callable[[], Result], doing: str, name: str) -> Result:
        return retry(attempt, self._policy, doing=f"{doing} `{self.target.label}{f'/{name}' if name else ''}`")
