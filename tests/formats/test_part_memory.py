"""Parts of many files at once hold a bounded number of bytes, and none waits for ever."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from formats.errors import UserError
from formats.remote.part_memory import DiskPart, MemoryPart, PartMemory


def test_parts_that_are_being_filled_never_hold_more_than_the_limit_and_more_are_filled_on_disk():
    memory = PartMemory(limit=30)
    parts = [memory.part(10) for _ in range(5)]
    assert [type(part) for part in parts] == [MemoryPart] * 3 + [DiskPart] * 2
    assert memory.held == 30
    for number, part in enumerate(parts):
        part.write(0, memoryview(bytes([number] * 4)))
        part.write(4, memoryview(bytes([number] * 6)))
        assert part.send(lambda data: bytes(data).hex()) == bytes([number] * 10).hex()


def test_a_part_waits_for_one_that_is_on_its_way():
    memory = PartMemory(limit=10)
    first = memory.part(10)
    memory.sending(first)
    started = threading.Event()

    def ask():
        started.set()
        return memory.part(10)

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(ask)
        started.wait()
        memory.sent(first)
        assert isinstance(second.result(timeout=60), MemoryPart)
    assert memory.held == 10


def test_a_part_larger_than_the_limit_is_taken_alone():
    memory = PartMemory(limit=10)
    assert isinstance(memory.part(100), MemoryPart)
    assert isinstance(memory.part(1), DiskPart)


def test_a_part_on_disk_arrives_whole_though_a_read_gives_less_than_was_asked_for(monkeypatch):
    preadv = os.preadv
    part = DiskPart(10)
    part.write(0, memoryview(b"0123456789"))
    with monkeypatch.context() as slow:
        slow.setattr(os, "preadv", lambda descriptor, out, offset: preadv(descriptor, [out[0][:3]], offset))
        assert part.send(bytes) == b"0123456789"


def test_a_part_that_is_not_all_on_disk_any_more_is_not_sent():
    part = DiskPart(10)
    part.write(0, memoryview(b"0123456789"))
    os.ftruncate(part._file.fileno(), 4)
    with pytest.raises(UserError, match="ends at byte 4"):
        part.send(bytes)
