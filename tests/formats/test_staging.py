"""Nothing stands at the target before success; what is worth it stays for another run; an old output goes last."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest

import formats.staging
from formats.disk import free_space
from formats.errors import TransientError, UserError
from formats.rendezvous import Rendezvous
from formats.staging import check_room, staged
from tests.models import tree

MANIFEST = {"command": "copy", "`tp`": 2}


def anything(_found):
    """A rule that lets everything go."""


@contextmanager
def staging(tmp_path, *, name="a1", manifest=None, rule=None, resume=False, notes=None):
    """A stage for `tmp_path/out`, as one process alone has it."""
    partial, target = tmp_path / f"out.partial-{name}", tmp_path / "out"
    options = {"rule": rule, "resume": resume, "note": (notes if notes is not None else []).append}
    with (
        Rendezvous(tmp_path / "ranks", 0, 1, "alone", target=target) as together,
        staged(target, partial, manifest or MANIFEST, together, **options) as stage,
    ):
        yield stage


def attempt(tmp_path, error=None, *, worth_keeping=True, spoilt=False, meanwhile=None, **options):
    """A run that writes one file, and then may fail."""
    with staging(tmp_path, **options) as stage:
        (stage.partial / "done").write_text("x")
        stage.worth_keeping, stage.spoilt = worth_keeping, spoilt
        if meanwhile:
            meanwhile()
        if error:
            raise error


def fail(tmp_path, error, **options):
    """What a run leaves that fails."""
    with pytest.raises(type(error)):
        attempt(tmp_path, error, **options)
    return sorted(path.name for path in tmp_path.iterdir())


def test_the_target_appears_when_the_block_ends_well(tmp_path):
    with staging(tmp_path) as stage:
        assert (stage.resumed, stage.worth_keeping) == (False, False)
        (stage.partial / "a").mkdir()
        (stage.partial / "a" / "b").write_text("x")
        assert not (tmp_path / "out").exists()
    assert tree(tmp_path) == {"out/a/b": b"x"}


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), TransientError("the network went away")], ids=repr)
def test_a_failure_leaves_what_is_worth_it_and_says_so(tmp_path, error):
    notes: list[str] = []
    assert not fail(tmp_path, error, worth_keeping=False, notes=notes)
    assert not notes
    assert fail(tmp_path, error, notes=notes) == ["out.partial-a1", "out.partial-a1.state"]
    assert notes[0].startswith(f"`{tmp_path / 'out.partial-a1'}` keeps what is done: finish it with the same command and `--res")
    with staging(tmp_path, resume=True) as stage:
        assert (stage.resumed, stage.worth_keeping) == (True, True)
    assert tree(tmp_path) == {"out/done": b"x"}


def test_nothing_is_left_of_what_would_fail_again_or_is_not_to_be_trusted(tmp_path):
    notes: list[str] = []
    assert not fail(tmp_path, UserError("the source is damaged"), notes=notes)
    assert not fail(tmp_path, ValueError("two bytes differ"), notes=notes, spoilt=True)
    assert not notes


def test_what_was_left_is_named_with_both_ways_out(tmp_path):
    fail(tmp_path, ValueError())
    left = tmp_path / "out.partial-a1"
    with pytest.raises(UserError, match=f"an interrupted run left `{left}`") as caught, staging(tmp_path, name="b2"):
        pass
    assert caught.value.hint == f"finish it with the same command and `--resume`, or remove it: `rm -r {left}.state {left}`"
    assert (left / "done").exists()


@pytest.mark.parametrize("name", ["a1", "b2"])
def test_another_run_does_not_go_on_and_names_what_changed(tmp_path, name):
    fail(tmp_path, ValueError())
    with pytest.raises(UserError, match="was begun with `tp` 2, now it is 1") as caught:
        fail(tmp_path, ValueError(), name=name, manifest={**MANIFEST, "`tp`": 1}, resume=True)
    assert "rm -r" in caught.value.hint
    assert tree(tmp_path / "out.partial-a1") == {"done": b"x"}


def test_what_does_not_tell_what_it_was_is_replaced(tmp_path):
    (tmp_path / "out.partial-a1" / "deep").mkdir(parents=True)
    (tmp_path / "out.partial-a1" / "deep" / "old").write_text("old")
    with staging(tmp_path) as stage:
        (stage.partial / "new").write_text("new")
    assert tree(tmp_path) == {"out/new": b"new"}


def test_what_dead_runs_left_beside_it_goes_with_the_next_success_but_nothing_else(tmp_path):
    for name in ("out.partial-b2.state", "out.partial-c3.ranks", "out.partial-backup", "outer.partial-b2"):
        (tmp_path / name).mkdir()
    with staging(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial-backup", "outer.partial-b2"]


def test_a_second_run_on_one_target_is_refused_and_harms_nothing(tmp_path):
    with staging(tmp_path) as stage:
        (stage.partial / "b").write_text("x")
        with pytest.raises(UserError, match="another run is writing"), staging(tmp_path, resume=True):
            pass
    assert tree(tmp_path) == {"out/b": b"x"}


def test_a_target_that_appears_meanwhile_is_left_alone_and_so_is_what_is_done(tmp_path):
    with pytest.raises(UserError, match="appeared while it was being made"):
        attempt(tmp_path, meanwhile=(tmp_path / "out").mkdir)
    (tmp_path / "out").rmdir()
    with staging(tmp_path, resume=True):
        pass
    assert tree(tmp_path) == {"out/done": b"x"}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged at once", "where the file system cannot"])
def test_an_old_output_goes_when_the_new_one_is_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr("formats.staging._exchange", lambda *_: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with staging(tmp_path, rule=anything) as stage:
        (stage.partial / "new").write_text("new")
        assert tree(tmp_path / "out") == {"old": b"old"}
    assert tree(tmp_path) == {"out/new": b"new"}


def test_who_is_stopped_right_after_the_commit_leaves_the_new_output_alone(tmp_path, monkeypatch):
    """The old one lies where the new one was made: nobody must go on there."""
    notes: list[str] = []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def stopped(path):
        if path == tmp_path:
            raise KeyboardInterrupt

    monkeypatch.setattr("formats.staging.sync", stopped)
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path, rule=anything, notes=notes)
    assert tree(tmp_path) == {"out/done": b"x"}
    assert not notes


@pytest.fixture
def killed_between(tmp_path):
    """What a run leaves that was killed between its two renames: the old output has no name, the new one not yet."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    fail(tmp_path, ValueError(), rule=anything)
    (tmp_path / "out").rename(tmp_path / "out.partial-a1.replaced")
    return tmp_path / "out.partial-a1.replaced"


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"name": "b2"}], ids=str)
def test_an_old_output_without_its_name_gets_it_back_whatever_the_next_run_is(tmp_path, killed_between, options):
    notes: list[str] = []
    with pytest.raises(UserError, match=f"`{tmp_path / 'out'}` already exists"):
        attempt(tmp_path, notes=notes, **options)
    assert notes == [f"`{tmp_path / 'out'}` was restored from `{killed_between}`, where an interrupted run had moved it"]
    assert tree(tmp_path / "out") == {"old": b"old"}
    assert tree(tmp_path / "out.partial-a1") == {"done": b"x"}


def test_resumed_it_ends_with_the_new_output_and_nothing_else(tmp_path, killed_between):
    with staging(tmp_path, rule=anything, resume=True) as stage:
        assert stage.resumed
        assert tree(tmp_path / "out") == {"old": b"old"}
    assert tree(tmp_path) == {"out/done": b"x"}


def test_where_something_else_came_in_its_place_the_old_output_is_named_and_goes_last(tmp_path, killed_between):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "newer").write_text("x")
    left = tmp_path / "out.partial-a1"
    with pytest.raises(UserError, match="an interrupted run left") as caught:
        attempt(tmp_path, rule=anything)
    assert caught.value.hint == (
        f"finish it with the same command and `--resume`, or remove it: `rm -r {left}.state {left}`; "
        f"`{killed_between}` is the previous output, which is kept until a new one is complete"
    )
    with staging(tmp_path, rule=anything, resume=True):
        assert tree(killed_between) == {"old": b"old"}
    assert tree(tmp_path) == {"out/done": b"x"}


def test_an_old_output_is_not_gone_on_with_although_the_new_one_was_moved_away(tmp_path):
    """A run was killed right after the two had changed places: what has the name of the partial output is the old one."""
    left, old = tmp_path / "out.partial-a1", tmp_path / "out"
    fail(tmp_path, ValueError())
    (tmp_path / "out.partial-a1.state" / "commit.json").write_text(str(left.stat().st_ino))
    old.mkdir()
    (old / "old").write_text("old")
    left.rename(tmp_path / "moved")
    old.rename(left)
    with staging(tmp_path, resume=True) as stage:
        assert not stage.resumed
        assert tree(left) == {}
    assert tree(tmp_path) == {"moved/done": b"x"}


def test_what_comes_between_the_last_look_and_the_rename_is_not_removed(tmp_path, monkeypatch):
    out, exchange = tmp_path / "out", formats.staging._exchange
    out.mkdir()
    (out / "old").write_text("old")

    def late(first, second):
        monkeypatch.undo()
        (out / "late").write_text("late")
        return exchange(first, second)

    monkeypatch.setattr("formats.staging._exchange", late)
    with pytest.raises(TransientError) as caught:
        attempt(tmp_path, rule=anything)
    assert str(caught.value) == (
        f"`{out}` changed while its replacement was being made: `late` appeared\n\n"
        "hint: move away what is to be kept, then give the same command again with `--resume`"
    )
    assert tree(out) == {"old": b"old", "late": b"late"}
    assert tree(tmp_path / "out.partial-a1") == {"done": b"x"}
    (out / "late").unlink()
    with staging(tmp_path, rule=anything, resume=True):
        pass
    assert tree(tmp_path) == {"out/done": b"x"}


def test_an_old_output_that_cannot_get_its_name_back_is_named(tmp_path, monkeypatch):
    notes: list[str] = []
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("formats.staging._exchange", lambda *_: False)
    rename = Path.rename

    def first_only(path, target):
        if path.name == "out":
            return rename(path, target)
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "rename", first_only)
    with pytest.raises(UserError, match="cannot use"):
        attempt(tmp_path, rule=anything, notes=notes)
    old = tmp_path / "out.partial-a1.replaced"
    assert notes[-1] == f"`{tmp_path / 'out'}` as it was before is `{old}`: rename it, or the next run restores it"
    assert old.is_dir()


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged at once", "where the file system cannot"])
def test_what_could_not_be_removed_is_named_and_the_output_stands(tmp_path, monkeypatch, exchange):
    notes: list[str] = []
    if not exchange:
        monkeypatch.setattr("formats.staging._exchange", lambda *_: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    unlink = os.unlink

    def busy(path, **options):
        if os.fspath(path) == "old":
            raise OSError(errno.EBUSY, "Device or resource busy")
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        attempt(tmp_path, rule=anything, notes=notes)
    left = tmp_path / ("out.partial-a1" if exchange else "out.partial-a1.replaced")
    assert notes == [f"`{left}` is not needed any more and could not be removed (Device or resource busy): `rm -r {left}`"]
    assert tree(tmp_path) == {"out/done": b"x", f"{left.name}/old": b"old"}


def test_what_an_earlier_run_left_and_cannot_be_removed_is_named_before_anything_is_done(tmp_path, monkeypatch):
    left = tmp_path / "out.partial-a1"
    (left / "old").mkdir(parents=True)
    monkeypatch.setattr("shutil.rmtree", lambda *_arguments, **_options: None)
    with pytest.raises(UserError) as caught:
        attempt(tmp_path)
    assert str(caught.value) == (
        f"`{left}` was left by an earlier run and could not be removed\n\nhint: remove it yourself: `rm -r {left}.state {left}`"
    )


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP], ids=errno.errorcode.get)
def test_a_file_system_that_does_not_sync_directories_will_do_but_one_that_loses_files_will_not(tmp_path, monkeypatch, number):
    def fsync(descriptor):
        if refuses(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    refuses = stat.S_ISDIR
    attempt(tmp_path)
    assert tree(tmp_path) == {"out/done": b"x"}
    refuses = stat.S_ISREG
    with pytest.raises(UserError, match=f"cannot use .*: {os.strerror(number)}"):
        attempt(tmp_path, name="b2", rule=anything)


def test_room_is_what_the_file_system_has_that_is_written_to(tmp_path, monkeypatch):
    asked = []

    def statvfs(path, real=os.statvfs):
        asked.append(Path(path))
        return real(path)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "statvfs", statvfs)
    with pytest.raises(TransientError, match=r"needs 1000000000\.00 GB, the disk has"):
        check_room(tmp_path / "out", 10**18, already=tmp_path / "out.partial-a1")
    assert asked == [tmp_path]


def test_a_file_system_that_does_not_tell_its_size_is_not_a_full_one(tmp_path, monkeypatch):
    """Some in user space answer with no blocks at all."""
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255)))
    check_room(tmp_path / "out", 10**18, already=tmp_path / "out.partial-a1")
    assert free_space(tmp_path) == "free space unknown"
