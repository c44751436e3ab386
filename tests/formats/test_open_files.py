"""Few descriptors are open at a time, whatever the number of files; none is closed while it is used, and no write is lost."""

from __future__ import annotations

import errno
import gc
import os
import random
import re
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from formats import open_files
from formats.disk import read_exactly, user_errors, write_all
from formats.errors import UserError
from formats.open_files import Files, most_open

WRITING = os.O_RDWR | os.O_CREAT


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No descriptors that other tests left open."""
    monkeypatch.setattr(open_files, "_OPEN", open_files._OpenFiles())


@pytest.fixture
def most(monkeypatch):
    monkeypatch.setattr(open_files, "MOST_OPEN", 3)
    return 3


def open_below(folder):
    """The files below a folder that this process has open, at one moment."""
    paths = []
    with open_files._OPEN._lock:  # else one could be counted before it is closed, and the next one too
        for link in os.listdir("/proc/self/fd"):  # noqa: PTH208
            with suppress(FileNotFoundError):  # that of the listing itself, or another test's
                paths.append(os.readlink(f"/proc/self/fd/{link}"))  # noqa: PTH115
    return sorted(path for path in paths if path.startswith(str(folder)))


def test_many_files_are_read_and_written_from_threads_with_few_open(tmp_path, most):
    sources, targets = Files(), Files(WRITING)
    paths = [tmp_path / f"{number}" for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 64)
    seen = set()

    def copy(step):
        path, offset, data = paths[step % 20], step // 20 * 8, bytearray(8)
        with sources.using(path) as descriptor:
            read_exactly(descriptor, memoryview(data), offset, path=path)
        with targets.using(path.with_suffix(".new")) as descriptor:
            write_all(descriptor, memoryview(data), offset)
            seen.add(len(open_below(tmp_path)))

    steps = list(range(160))
    random.Random(1).shuffle(steps)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(copy, steps))
    targets.sync()
    assert max(seen) <= most
    assert all(path.with_suffix(".new").read_bytes() == path.read_bytes() for path in paths)
    sources.close()
    targets.close()
    assert open_below(tmp_path) == []


def test_a_descriptor_in_use_is_not_closed_for_another(tmp_path, most):
    files = Files(WRITING)
    with files.using(tmp_path / "kept") as kept:
        for number in range(10):
            with files.using(tmp_path / f"{number}"):
                os.fstat(kept)
        assert str(tmp_path / "kept") in open_below(tmp_path)
    files.close()


def test_a_thread_waits_while_all_are_in_use(tmp_path, most):
    files, entered, leave = Files(WRITING), threading.Barrier(most + 1), threading.Event()

    def hold(number):
        with files.using(tmp_path / f"{number}"):
            entered.wait()
            leave.wait()

    def fourth():
        with files.using(tmp_path / "fourth"):
            return len(open_below(tmp_path))

    with ThreadPoolExecutor(most + 1) as pool:
        for number in range(most):
            pool.submit(hold, number)
        entered.wait()
        late = pool.submit(fourth)
        assert not (tmp_path / "fourth").exists()
        leave.set()
        assert late.result() <= most
    files.close()


def test_what_is_closed_early_was_synced_and_what_stays_is_synced_once(tmp_path, most, monkeypatch):
    synced, fsync = [], os.fsync

    def watch(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)  # noqa: PTH115 - the link, not what it leads to
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    files = Files(WRITING)
    for name in "abcde":
        with files.using(tmp_path / name) as descriptor:
            os.write(descriptor, b"x")
    assert synced == ["a", "b"]
    files.sync()
    files.sync()
    assert synced == ["a", "b", "c", "d", "e"]
    files.close()


def test_files_that_were_only_read_are_closed_before_those_that_need_a_sync(tmp_path, most, monkeypatch):
    (tmp_path / "read").write_bytes(b"x")
    reading, writing = Files(), Files(WRITING)
    for name in ("a", "b"):
        with writing.using(tmp_path / name):
            pass
    with reading.using(tmp_path / "read"):
        pass
    monkeypatch.delattr(os, "fsync")
    with writing.using(tmp_path / "c"):
        assert open_below(tmp_path) == [str(tmp_path / name) for name in "abc"]
    reading.close()
    writing.close()


def test_a_sync_that_failed_on_the_way_is_raised_again_and_again(tmp_path, most, monkeypatch):
    """The system tells of a lost write once, here in the middle of reading another file."""
    (tmp_path / "other").write_bytes(b"x")
    writing, reading, fsync = Files(WRITING), Files(), os.fsync

    def fail(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/lost"):  # noqa: PTH115
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    with writing.using(tmp_path / "lost"):
        monkeypatch.setattr(os, "fsync", fail)
    for name in ("a", "b"):
        with writing.using(tmp_path / name):
            pass
    with reading.using(tmp_path / "other"):
        pass
    monkeypatch.setattr(os, "fsync", fsync)
    for act in (writing.sync, writing.sync, lambda: writing.using(tmp_path / "a").__enter__()):
        with pytest.raises(OSError, match="Input/output error") as failure:
            act()
        assert failure.value.filename == str(tmp_path / "lost")
    with reading.using(tmp_path / "other"):
        pass
    writing.close()
    reading.close()


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"longer"), lambda path: os.utime(path, ns=(1, 1))])
def test_a_source_that_changed_while_it_was_closed_is_not_read_on(tmp_path, most, change):
    files = Files()
    for name in "abcd":
        (tmp_path / name).write_bytes(b"x")
    for name in "abcd":
        with files.using(tmp_path / name):
            pass
    change(tmp_path / "a")
    message = f"`{tmp_path / 'a'}` changed while it was being read\n\nhint: run it again once nothing is writing to it"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        files.using(tmp_path / "a").__enter__()
    files.close()


def test_an_output_that_vanished_while_it_was_closed_is_not_made_anew(tmp_path, most):
    files = Files(WRITING)
    for name in "abcd":
        with files.using(tmp_path / name) as descriptor:
            os.write(descriptor, b"x")
    (tmp_path / "a").unlink()
    with pytest.raises(FileNotFoundError):
        files.using(tmp_path / "a").__enter__()
    files.close()


@pytest.mark.parametrize(("soft", "expected"), [(40, 20), (100, 50), (1024, 128), (resource.RLIM_INFINITY, 128), (1, 1)])
def test_no_more_than_half_of_what_the_process_may_open(monkeypatch, soft, expected):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
    assert most_open() == expected


def test_where_the_rest_of_the_process_has_taken_the_descriptors_ours_are_closed_first(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    files, others = Files(WRITING), []
    for number in range(8):
        with files.using(tmp_path / f"{number}"):
            pass
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        with suppress(OSError):
            while True:
                others.append(os.dup(0))
        with files.using(tmp_path / "one more") as descriptor:
            assert os.fstat(descriptor)
    finally:
        for other in others:
            os.close(other)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        files.close()


def test_files_that_nobody_holds_are_closed(tmp_path):
    files = Files(WRITING)
    with files.using(tmp_path / "a"):
        pass
    assert open_below(tmp_path) == [str(tmp_path / "a")]
    del files
    gc.collect()
    assert open_below(tmp_path) == []


def test_closing_waits_for_nobody_and_what_is_in_use_is_closed_when_it_is_given_back(tmp_path):
    files = Files(WRITING)
    with files.using(tmp_path / "a") as descriptor:
        files.close()
        assert os.fstat(descriptor)
    assert open_below(tmp_path) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(tmp_path, mask, mode):
    files, before = Files(WRITING), os.umask(mask)
    try:
        with files.using(tmp_path / "a"):
            pass
    finally:
        os.umask(before)
    files.close()
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_where_nothing_is_left_to_close_the_error_says_what_to_raise(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        with suppress(OSError):
            while True:
                others.append(os.dup(0))
        files = Files(WRITING)
        with pytest.raises(UserError) as failure, user_errors():
            files.using(tmp_path / "a").__enter__()
    finally:
        for other in others:
            os.close(other)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert str(failure.value) == (
        f"cannot use `{tmp_path / 'a'}`: Too many open files\n\nhint: raise the limit on open files (`ulimit -n`)"
    )


def test_what_is_written_after_a_sync_in_the_same_loan_is_synced_by_the_next(tmp_path, monkeypatch):
    """One thread writes down what is on the disk while others write."""
    on_disk, fsync = [], os.fsync

    def watch(descriptor):
        fsync(descriptor)
        on_disk.append(os.pread(descriptor, 9, 0))

    monkeypatch.setattr(os, "fsync", watch)
    files = Files(WRITING)
    with files.using(tmp_path / "a") as descriptor:
        os.write(descriptor, b"before")
        files.sync()
        os.write(descriptor, b" it")
    files.sync()
    files.sync()
    assert on_disk == [b"before", b"before it"]
    files.close()
