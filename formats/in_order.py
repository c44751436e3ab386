"""Bytes that arrive by position, from several threads, handed on from a file's first byte to its last.

Hashes and uploads need them so. Whoever comes too early waits for its turn. That ends well if every byte comes once, and if
pieces are drawn so that each name's come in order: then the earliest one that is drawn never waits for another. Knows neither
disks nor networks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from formats.spec import Span


class Sink(Protocol):
    """What takes bytes in order."""

    def update(self, data: memoryview, /) -> object: ...


class AbandonedError(Exception):
    """Raised in threads that wait for a turn that will not come."""


class InOrder[S: Sink]:
    """Streams by name. `spans(name)` tells what lies in one; `finished(name, sink)` is called when its last byte is through."""

    def __init__(
        self, spans: Callable[[str], Iterable[Span]], sink: Callable[[str], S], finished: Callable[[str, S], None]
    ) -> None:
        self._spans, self._sink, self._finished = spans, sink, finished
        self._streams: dict[str, _Stream[S]] = {}
        self._ended: set[str] = set()
        self._turn = threading.Condition()
        self._abandoned = False

    def put(self, name: str, offset: int, data: memoryview) -> None:
        """Hand on data that lies at `offset`, once all before it is through.

        Raises AbandonedError if the others have given up.
        """
        with self._turn:
            assert name not in self._ended, f"all of {name} has passed"
            stream = self._streams.get(name) or self._open(name)
            assert offset >= stream.at, f"{name} is at {stream.at}, {offset} has passed"
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
        """Wake everyone who waits."""
        with self._turn:
            self._abandoned = True
            self._turn.notify_all()

    def _open(self, name: str) -> _Stream[S]:
        self._streams[name] = _Stream(self._sink(name), iter(self._spans(name)))
        return self._streams[name]


class _Stream[S: Sink]:
    """One name: how far it is, and what comes next."""

    def __init__(self, sink: S, spans: Iterator[Span]) -> None:
        self.sink = sink
        self.at = 0
        self._spans = spans
        self._until = 0
        self._skip_known()

    def take(self, data: memoryview) -> bool:
        """Hand on data; was it the last? Whoever waits for `at` may go on as soon as it moves."""
        self.sink.update(data)
        at = self.at + len(data)
        if at < self._until:
            self.at = at
            return False
        return self._skip_known(at)

    def _skip_known(self, at: int = 0) -> bool:
        """Hand on what is known, up to the next data; is there none?"""
        for span in self._spans:
            if span.known is None and span.size:
                self._until, self.at = span.stop, at
                return False
            if span.known:
                self.sink.update(memoryview(span.known))
                at = span.stop
        self.at = at
        return True
