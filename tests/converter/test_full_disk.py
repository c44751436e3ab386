"""A disk that is full or breaks half-way: a clear error, what is done is kept, and resumed once there is room."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from converter import hf_to_mcore
from formats import open_files
from formats.errors import UserError
from tests.interrupted import Conversion, journaled, make_source, partial, written
from tests.models import tree

SOURCE = Path(__file__).parents[1] / "fault.c"
SAID = {errno.ENOSPC: "no room left for", errno.EDQUOT: "no room left for", errno.EIO: "cannot use"}
OPTIONS = ("--tp", 2, "--pp", 2)


@pytest.fixture(scope="module")
def fault(tmp_path_factory):
    """The environment of a process for which a call fails."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("a failing disk is a library to be compiled, and there is no C compiler")
    library = tmp_path_factory.mktemp("fault") / "fault.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)

    def env(call, path, nth, number):
        named = {"FAULT_CALL": call, "FAULT_PATH": path, "FAULT_NTH": str(nth), "FAULT_ERRNO": str(number)}
        return {"LD_PRELOAD": str(library), **named}

    return env


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("full") / "hf")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("whole") / "m"
    hf_to_mcore(model, target, tp=2, pp=2)
    return tree(target)


@pytest.fixture
def convert(model, tmp_path):
    """A conversion to `m` from its start to its end."""

    def run(*options, target=tmp_path / "m", **how):
        process = Conversion("hf-to-mcore", model, target, *OPTIONS, *options, **{"log": tmp_path / "log", "pause": 0, **how})
        return *process.end(), process.summary

    return run


def failed(result, target, *, message):
    """The error's text, held to what every such error must say."""
    code, text, _ = result
    assert code == 1, text
    assert "Traceback" not in text
    error = text[text.index("error: ") :]
    assert f"error: {message}" in error
    assert str(target) in error
    assert not target.exists()
    left = partial(target)
    assert f"note: `{left}` keeps what is done: finish it with the same command and `--resume`" in text
    assert not target.with_name(f"{target.name}.lock").exists()
    return error


@pytest.mark.parametrize(
    "case",
    [(errno.ENOSPC, 16 << 10), (errno.ENOSPC, 128 << 10), (errno.EDQUOT, 16 << 10), (errno.EIO, 128 << 10)],
    ids=["full", "full, past the page cache", "over quota", "broken, past the page cache"],
)
def test_a_write_that_fails_keeps_what_is_done(convert, fault, whole, tmp_path, case):
    number, piece_bytes = case
    env = fault("pwrite", ".distcp", 12, number)
    failed(convert(env=env, piece_bytes=piece_bytes), tmp_path / "m", message=SAID[number])
    code, text, summary = convert("--resume", piece_bytes=piece_bytes)
    assert code == 0, text
    assert summary["reused_bytes"] > 0
    assert tree(tmp_path / "m") == whole


@pytest.mark.parametrize(
    "step",
    [("pwrite", "conversion.json", 1), ("pwrite", "tokenizer.json", 1), ("write", "journal-", 9), ("fsync", "latest_check", 1)],
    ids=["a document", "a copy", "the journal", "the commit"],
)
def test_no_room_at_any_step_keeps_what_is_done(convert, fault, whole, tmp_path, step):
    error = failed(convert(env=fault(*step, errno.ENOSPC)), tmp_path / "m", message="no room left for")
    assert "free space, then continue with `--resume`" in error
    code, text, summary = convert("--resume")
    assert code == 0, text
    assert summary["reused_bytes"] > 0
    assert tree(tmp_path / "m") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "m"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_what_a_failed_sync_may_have_lost_is_written_again(convert, fault, whole, tmp_path, number):
    failed(convert(env=fault("fsync", ".distcp", 2, number)), tmp_path / "m", message=SAID[number])
    before = sum(written(tmp_path / "log"))
    code, text, summary = convert("--resume")
    assert code == 0, text
    assert summary["reused_bytes"] == 0
    assert sum(written(tmp_path / "log")) == 2 * before
    assert tree(tmp_path / "m") == whole


def test_what_an_earlier_run_wrote_is_synced_before_a_later_one_counts_on_it(convert, model, fault, whole, tmp_path):
    """Else the failure would be told once, to a run that did not write the data, and forgotten."""
    killed = Conversion("hf-to-mcore", model, tmp_path / "m", *OPTIONS, log=tmp_path / "first", hold={"write": 30})
    killed.until("write", 30)
    killed.stop()
    failed(convert("--resume", env=fault("fsync", ".distcp", 1, errno.EIO)), tmp_path / "m", message="cannot use")
    assert convert("--resume")[2]["reused_bytes"] == 0
    assert tree(tmp_path / "m") == whole


def test_no_room_for_the_first_file_leaves_nothing(convert, fault, tmp_path):
    for path in ("job.json", "m.lock"):
        code, text, _ = convert(env=fault("write", path, 1, errno.ENOSPC))
        assert code == 1
        assert f"error: no room left for `{tmp_path / 'm'}`" in text
        assert "keeps" not in text
        assert [entry.name for entry in tmp_path.iterdir() if entry.name != "log"] == []


def test_a_lock_is_let_go_of_though_there_is_no_room_for_a_claim_to_it(convert, fault, tmp_path):
    assert convert(env=fault("write", "m.lock.", 1, errno.ENOSPC))[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "m"]


def test_an_old_output_is_replaced_where_directories_cannot_change_places(convert, fault, whole, model, tmp_path):
    hf_to_mcore(model, tmp_path / "m")
    assert convert("--overwrite", env=fault("renameat2", "", 1, errno.EINVAL))[0] == 0
    assert tree(tmp_path / "m") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "m"]


def test_killed_where_they_cannot_the_old_output_gets_its_name_back(convert, fault, whole, model, tmp_path):
    """Between the first rename and the second."""
    hf_to_mcore(model, tmp_path / "m")
    old, env = tree(tmp_path / "m"), fault("renameat2", "", 1, errno.EINVAL)
    how = {"log": tmp_path / "log", "pause": 0, "pauses": {"rename 2": 600}, "env": env}
    process = Conversion("hf-to-mcore", model, tmp_path / "m", *OPTIONS, "--overwrite", **how)
    process.until("rename", 2)
    process.stop()
    assert not (tmp_path / "m").exists()
    code, text, _ = convert("--resume")
    assert (code, tree(tmp_path / "m")) == (1, old)
    assert f"`{tmp_path / 'm'}` already exists" in text
    assert convert("--resume", "--overwrite")[0] == 0
    assert tree(tmp_path / "m") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "m"]


def test_a_limit_on_the_size_of_files_is_named(convert, whole, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    error = failed(convert(preexec_fn=limit), tmp_path / "m", message="no room left for")
    assert "File too large" in error
    assert "`ulimit -f`" in error
    assert convert("--resume")[0] == 0
    assert tree(tmp_path / "m") == whole


def test_an_unreadable_source_is_not_taken_for_a_full_disk(convert, model, fault, tmp_path):
    code, text, _ = convert(env=fault("preadv", ".safetensors", 20, errno.EIO))
    assert code == 1
    assert f"cannot use `{model}/model-" in text


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for the output; None where mounting one is refused."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "small", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_others_fill_is_said_and_the_conversion_ends_when_there_is_room(model, whole, small_disk, fault, tmp_path):
    target = (small_disk or tmp_path) / "m"
    command, log = ("hf-to-mcore", model, target, *OPTIONS), tmp_path / "log"
    full = {} if small_disk else fault("pwrite", ".distcp", 60, errno.ENOSPC)
    process = Conversion(*command, log=log, env=full, hold={"write": 20})
    process.until("write", 20)
    if small_disk:
        fill(small_disk / "ballast")
    process.release()
    failed((*process.end(), process.summary), target, message="no room left for")
    (target.parent / "ballast").unlink(missing_ok=True)
    process = Conversion(*command, "--resume", log=log)
    assert process.end()[0] == 0
    assert process.summary["reused_bytes"] > 0
    assert tree(target) == whole


def fill(path):
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_what_a_sync_lost_in_the_middle_of_the_run_is_written_again(model, whole, tmp_path, monkeypatch):
    """Of many files, few are open at a time, so one is synced and closed for another; the system tells of a loss only then."""
    fsync, synced, lost = os.fsync, [], []

    def lost_once(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append(path)
        if path.suffix == ".distcp" and not lost and len(synced) > 9:
            lost.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(open_files, "MOST_OPEN", 2)
    monkeypatch.setattr(os, "fsync", lost_once)
    with pytest.raises(UserError) as failure:
        hf_to_mcore(model, tmp_path / "m", tp=2, pp=2, workers=1)
    assert journaled(tmp_path / "m")
    assert str(failure.value) == f"cannot use `{lost[0]}`: Input/output error"
    assert hf_to_mcore(model, tmp_path / "m", tp=2, pp=2, resume=True).reused_bytes == 0
    assert tree(tmp_path / "m") == whole
