"""Pass on bytes that several threads deliver by offset, in order from a file's first byte to its last.

Hashes and uploads consume bytes sequentially; a thread that arrives early blocks until its offset is next. No deadlock is
possible if every byte is delivered once and if work is handed to threads in order of offset within each name: then the
earliest piece in progress never waits. Disks and networks are left to the sinks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from formats.spec import Span


class Sink(Protocol):
    """A consumer of bytes in order, such as a hash."""

    def update(self, data: memoryview, /) -> object: ...


class AbandonedError(Exception):
    """Raised in threads that wait after another thread has given up."""


class InOrder[S: Sink]:
    """Streams by name, fed from several threads. `spans(name)` gives a stream's known bytes and the ranges of its data;
    `finished(name, sink)` is called after its last byte, on the thread that delivered it."""

    def __init__(
        self, spans: Callable[[str], Iterable[Span]], sink: Callable[[str], S], finished: Callable[[str, S], None]
    ) -> None:
        self._spans, self._sink, self._finished = spans, sink, finished
        self._streams: dict[str, _Stream[S]] = {}
        self._ended: set[str] = set()
        self._turn = threading.Condition()
        self._abandoned = False

    def put(self, name: str, offset: int, data: memoryview) -> None:
        """Pass on `data`, which begins at `offset`; blocks until all bytes before it have been passed on.

        Raises AbandonedError after `abandon`.
        """
        with self._turn:
            assert name not in self._ended, f"all of {name} was passed on already"
            stream = self._streams.get(name) or self._open(name)
            assert offset >= stream.at, f"{name} is at {stream.at}, {offset} was passed on already"
            self._turn.wait_for(lambda: self._abandoned or stream.at == offset)
            if self._abandoned:
                raise AbandonedError
        ended = stream.take(data)
        with self._turn:
            if ended:
                del self._streams[name]
                self._ended.add(name)
            self._turn.notify_all()
        if ended:
            self._finished(name, stream.sink)

    def abandon(self) -> None:
        """Wake all waiting threads with AbandonedError."""
        with self._turn:
            self._abandoned = True
            self._turn.notify_all()

    def _open(self, name: str) -> _Stream[S]:
        self._streams[name] = _Stream(self._sink(name), iter(self._spans(name)))
        return self._streams[name]


class _Stream[S: Sink]:
    """One stream: its sink, and the offset that is next (`at`)."""

    def __init__(self, sink: S, spans: Iterator[Span]) -> None:
        self.sink = sink
        self.at = 0
        self._spans = spans
        self._until = 0
        self._skip_known()

    def take(self, data: memoryview) -> bool:
        """Pass on data; return whether it was the last. Setting `at` releases the thread that waits for it, so it is set last."""
        self.sink.update(data)
        at = self.at + len(data)
        if at < self._until:
            self.at = at
            return False
        return self._skip_known(at)

    def _skip_known(self, at: int = 0) -> bool:
        """Pass on known bytes up to the next data; return whether there is no more data."""
        for span in self._spans:
            if span.known is None and span.size:
                self._until, self.at = span.stop, at
                return False
            if span.known:
                self.sink.update(memoryview(span.known))
                at = span.stop
        self.at = at
        return True
