"""Direct I/O on file systems and machines that want more than 4096 bytes of alignment: the same bytes, and `--verify` works."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import defaultdict

import pytest

from converter import hf_to_mcore, mcore_to_hf
from formats.disk import io_alignment
from tests.models import model_tree, tree

COARSE = 64 << 10


@pytest.fixture(scope="session")
def source(model_folder):
    """Tensors of several blocks of 64 KiB."""
    return model_folder("gqa", vocab_size=4096)


@pytest.fixture(scope="session")
def expected(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    hf_to_mcore(source, folder / "m", tp=2)
    return tree(folder / "m")


def is_direct(descriptor):
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


class Transfers:
    """Every read and write, before it is done: `seen(kind, descriptor, offset, length)`, which may raise."""

    def __init__(self, monkeypatch, seen):
        preadv, pwrite = os.preadv, os.pwrite

        def read(descriptor, buffers, offset):
            seen("read", descriptor, offset, sum(len(buffer) for buffer in buffers))
            return preadv(descriptor, buffers, offset)

        def write(descriptor, data, offset):
            seen("write", descriptor, offset, len(data))
            return pwrite(descriptor, data, offset)

        monkeypatch.setattr(os, "preadv", read)
        monkeypatch.setattr(os, "pwrite", write)


@pytest.mark.parametrize(
    "refusal", [(COARSE, errno.EINVAL), (COARSE, errno.EOPNOTSUPP), (1 << 40, errno.EINVAL)], ids=["off 64 KiB", "other", "all"]
)
def test_where_direct_reads_and_writes_are_refused_both_go_through_the_cache(source, expected, tmp_path, monkeypatch, refusal):
    (aligned_to, number), refused = refusal, set()

    def refuse(kind, descriptor, offset, length):
        if is_direct(descriptor) and (offset % aligned_to or length % aligned_to):
            refused.add(kind)
            raise OSError(number, os.strerror(number))

    Transfers(monkeypatch, refuse)
    hf_to_mcore(source, tmp_path / "m", tp=2, verify=True)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert refused == {"read", "write"}
    assert tree(tmp_path / "m") == expected
    assert model_tree(tmp_path / "back") == model_tree(source)


def test_where_opening_for_direct_io_is_refused_reads_go_through_the_cache(source, expected, tmp_path, monkeypatch):
    open_ = os.open

    def refuse(path, flags, *more, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return open_(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    hf_to_mcore(source, tmp_path / "m", tp=2, verify=True)
    assert tree(tmp_path / "m") == expected


def test_no_page_of_a_machine_with_large_ones_is_written_both_directly_and_through_the_cache(
    source, expected, tmp_path, monkeypatch
):
    ways = defaultdict(set)

    def note(kind, descriptor, offset, length):
        if kind == "write" and length:
            path = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 - the link, not what it leads to
            for page in range(offset // COARSE, (offset + length - 1) // COARSE + 1):
                ways[path, page].add(is_direct(descriptor))

    monkeypatch.setattr(mmap, "PAGESIZE", COARSE)
    assert io_alignment() == COARSE
    Transfers(monkeypatch, note)
    hf_to_mcore(source, tmp_path / "m", tp=2, verify=True)
    assert tree(tmp_path / "m") == expected, "the alignment within files is the format's, not the machine's"
    assert {True} in ways.values()
    assert {True, False} not in ways.values()


def test_smaller_pages_than_4096_do_not_make_blocks_smaller(monkeypatch):
    monkeypatch.setattr(mmap, "PAGESIZE", 1024)
    assert io_alignment() == 4096


def test_outputs_have_the_permissions_that_the_umask_leaves(source, tmp_path):
    before = os.umask(0o002)
    try:
        hf_to_mcore(source, tmp_path / "m", tp=2)
        mcore_to_hf(tmp_path / "m", tmp_path / "back")
    finally:
        os.umask(before)
    files = [path for name in ("m", "back") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o664"}
