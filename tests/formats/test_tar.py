"""A tar archive is read in place, and one that is damaged or hostile is named before anything of it is read."""

from __future__ import annotations

import io
import os
import tarfile

import numpy as np
import pytest

from converter.sources import open_source
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter, plan_shards
from formats.tar import TarFolder
from tests.formats.conformance import FormatSuite

FILES = {"config.yaml": b"a: 1\n", "weights/a/0": b"x" * 700, "weights/a/1": b"", "weights/b": b"yz"}


def written(path, files=None, *, start="./", form=tarfile.GNU_FORMAT, change=lambda archive: None):
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in (FILES if files is None else files).items():
            member = tarfile.TarInfo(start + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        change(archive)
    return path


def opened(path):
    return TarFolder(LocalFolder(path.parent), path.name)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("start", ["", "./"])
def test_an_archive_is_a_folder(tmp_path, form, start):
    folder = opened(written(tmp_path / "a.nemo", {**FILES, f"{'long/' * 15}x": b"1"}, start=start, form=form))
    assert folder.children() == ["config.yaml", "long/", "weights/"]
    assert folder.files() == sorted([*FILES, f"{'long/' * 15}x"])
    inner = folder.below("weights")
    assert (inner.name, inner.label, inner.children()) == ("weights", f"{tmp_path}/a.nemo/weights", ["a/", "b"])
    assert {f"weights/{name}": inner.get(name) for name in inner.files()}.items() <= FILES.items()
    assert (inner.below("a").get("0"), inner.has("a"), inner.size("a/1")) == (b"x" * 700, False, 0)
    out = bytearray(3)
    inner.read_into("a/0", 697, memoryview(out))
    assert out == b"xxx"
    with pytest.raises(UserError, match=r"`b` in `.*a.nemo/weights` ends after 2 bytes"):
        inner.read_into("b", 1, memoryview(out))
    with pytest.raises(UserError, match=r"a.nemo/weights` has no `c`"):
        inner.size("c")


def test_what_the_command_line_names_is_opened_by_its_content(tmp_path):
    assert open_source(written(tmp_path / "a.bin")).children() == ["config.yaml", "weights/"]


def special(kind, **fields):
    def add(archive):
        member = tarfile.TarInfo("weights/special")
        member.type = kind
        for name, value in fields.items():
            setattr(member, name, value)
        archive.addfile(member)

    return add


HOSTILE = {
    "a link": ({}, special(tarfile.SYMTYPE, linkname="/etc/passwd"), "a member that is not a plain file: `weights/special`"),
    "a hard link": ({}, special(tarfile.LNKTYPE, linkname="weights/b"), "a member that is not a plain file"),
    "a device": ({}, special(tarfile.CHRTYPE), "a member that is not a plain file"),
    "a path above": ({"../x": b"1"}, None, "a name that leaves the archive: `../x`"),
    "a path above within": ({"a/../../x": b"1"}, None, "a name that leaves the archive"),
    "an absolute path": ({"/x": b"1"}, None, "a name that leaves the archive: `/x`"),
    "a second member": ({"weights/b": b"1"}, lambda archive: archive.addfile(tarfile.TarInfo("./weights/b")), "two members"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_members_that_are_no_files_of_the_archive_are_named(tmp_path, name):
    files, change, message = HOSTILE[name]
    path = written(tmp_path / "a.nemo", files, start="", change=change or (lambda archive: None))
    with pytest.raises(UserError) as error:
        opened(path)
    assert message in str(error.value)


def test_a_sparse_member_is_named(tmp_path):
    path = written(tmp_path / "a.nemo", {"a": b"x" * 512}, start="")
    raw = bytearray(path.read_bytes())
    raw[156:157] = b"S"
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"not a plain file: `a`|not a readable tar archive"):
        opened(path)


@pytest.mark.parametrize("size", [100, 512, 1024, 1600, 2560, 3072])
def test_a_truncated_archive_is_named(tmp_path, size):
    path = written(tmp_path / "a.nemo")
    os.truncate(path, size)
    with pytest.raises(UserError, match=r"a.nemo` is (truncated|not a readable tar archive)"):
        opened(path)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_archive_is_named_with_the_way_to_unpack_it(tmp_path, kind):
    with tarfile.open(tmp_path / "a.nemo", f"w:{kind}") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    with pytest.raises(UserError, match=r"is compressed with \w+: it cannot be read in place\n\nhint: .*tar xf a.nemo -C DIR"):
        open_source(tmp_path / "a.nemo")


def test_an_extended_header_that_claims_gigabytes_takes_no_memory(tmp_path):
    path = tmp_path / "a.nemo"
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 8 << 30
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 9 << 30)
    with pytest.raises(UserError, match=r"a header in `a.nemo` has \d+ bytes"):
        opened(path)


class TestInATar(FormatSuite):
    """Safetensors files in an archive."""

    def writer(self, specs):
        return HuggingFaceWriter(plan_shards(specs, limit=2000))

    def reader(self, folder):
        path = folder.path.with_name(f"{folder.path.name}.tar")
        with tarfile.open(path, "w") as archive:
            archive.add(folder.path, "model")
        return HuggingFaceReader(TarFolder(LocalFolder(path.parent, direct=folder._direct), path.name).below("model"))


def test_zeros_after_the_last_member_are_no_members(tmp_path):
    path = written(tmp_path / "a.nemo")
    with path.open("ab") as file:
        file.write(np.zeros(4096, np.uint8).tobytes())
    assert opened(path).files() == sorted(FILES)
