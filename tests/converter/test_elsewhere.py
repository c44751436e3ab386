"""Conversions on systems that lack what Linux has, as macOS does; clear refusals where nothing can work."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from converter import UserError, check, hf_to_mcore, inspect, mcore_to_hf, verify
from converter.journal import boot_id
from converter.memory import peak_memory, resident_memory
from formats import staging
from tests.models import model_tree, tree

ONLY_ON_LINUX = ["O_DIRECT", "posix_fadvise", "POSIX_FADV_DONTNEED", "preadv", "pwritev"]


@pytest.fixture(scope="module")
def source(model_folder):
    """Its tensors are large enough for direct I/O."""
    return model_folder("gqa", vocab_size=4096)


@pytest.fixture
def elsewhere(source, monkeypatch):
    """A system without direct I/O, advice on the page cache, vectored reads, exchanging renames, and /proc."""
    for name in ONLY_ON_LINUX:
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(staging.ctypes, "CDLL", lambda _: SimpleNamespace())
    for name in ("read_text", "readlink", "is_file"):
        monkeypatch.setattr(Path, name, _without_proc(getattr(Path, name)))


def _without_proc(act):
    def look(path, *arguments, **options):
        if str(path).startswith("/proc/"):
            if act.__name__ == "is_file":
                return False
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return act(path, *arguments, **options)

    return look


def test_both_ways_work_where_only_posix_is_there(source, tmp_path, elsewhere):
    hf_to_mcore(source, tmp_path / "m", tp=2, pp=2, verify=True)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(source)
    assert verify(source, tmp_path / "m").same
    assert check(tmp_path / "m").whole
    assert inspect(tmp_path / "m").layers == 4


def test_outputs_there_are_those_of_linux_and_replace_older_ones(source, tmp_path, request):
    hf_to_mcore(source, tmp_path / "linux", tp=2)
    request.getfixturevalue("elsewhere")
    hf_to_mcore(source, tmp_path / "m", pp=2)
    hf_to_mcore(source, tmp_path / "m", tp=2, overwrite=True)
    assert tree(tmp_path / "m") == tree(tmp_path / "linux")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linux", "m"]


def test_a_system_without_names_for_its_boots_has_a_new_one_each_time(elsewhere):
    assert boot_id() != boot_id()


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_memory_is_in_bytes_by_what_getrusage_counts_in(monkeypatch, elsewhere, platform, unit):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=123_456))
    assert peak_memory() == resident_memory() == 123_456 * unit


def test_the_packages_import_where_there_is_no_resource_module():
    lines = [
        "import sys",
        "sys.modules['resource'] = None",
        "import converter.cli, converter.console, converter.convert, converter.proof, converter.adapters.merge",
        "from converter.memory import peak_memory",
        "from formats.open_files import MOST_OPEN, most_open",
        "assert most_open() == MOST_OPEN and peak_memory() > 0",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


REFUSALS = {
    "byteorder": """\
this machine stores numbers big-endian, checkpoints hold them little-endian

hint: convert on another machine, x86-64 or ARM""",
    "platform": """\
`win32` is not supported: reads and writes at positions (`pread`, `pwrite`) are missing on Windows

hint: use the Windows Subsystem for Linux, or another machine""",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_machine_that_cannot_is_refused_at_once_by_every_entry(source, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, name, {"byteorder": "big", "platform": "win32"}[name])
    for act in (
        lambda: hf_to_mcore(source, tmp_path / "m"), lambda: mcore_to_hf(source, tmp_path / "m"), lambda: inspect(source),
        lambda: check(source), lambda: verify(source, source),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{re.escape(REFUSALS[name])}$"):
            act()
    assert not list(tmp_path.iterdir())
