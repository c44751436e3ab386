"""Nothing stands at the target before success; what is worth it stays for another run; an old output goes last."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from formats.errors import TransientError, UserError
from formats.rendezvous import Rendezvous
from formats.staging import staged
from tests.models import tree

MANIFEST = {"command": "copy", "`tp`": 2}


def anything(_found):
    """A rule that lets everything go."""


@contextmanager
def staging(tmp_path, *, name="a1", manifest=None, rule=None, resume=False, said=None):
    """A stage for `tmp_path/out`, as one process alone has it."""
    partial, target = tmp_path / f"out.partial-{name}", tmp_path / "out"
    options = {"rule": rule, "resume": resume, "note": (said if said is not None else []).append}
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
    said: list[str] = []
    assert not fail(tmp_path, error, worth_keeping=False, said=said)
    assert not said
    assert fail(tmp_path, error, said=said) == ["out.partial-a1", "out.partial-a1.state"]
    assert said[0].startswith(f"`{tmp_path / 'out.partial-a1'}` keeps what is done: finish it with the same command and `--res")
    with staging(tmp_path, resume=True) as stage:
        assert (stage.resumed, stage.worth_keeping) == (True, True)
    assert tree(tmp_path) == {"out/done": b"x"}


def test_nothing_is_left_of_what_would_fail_again_or_is_not_to_be_trusted(tmp_path):
    said: list[str] = []
    assert not fail(tmp_path, UserError("the source is damaged"), said=said)
    assert not fail(tmp_path, ValueError("two bytes differ"), said=said, spoilt=True)
    assert not said


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
    said: list[str] = []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def stopped(path):
        if path == tmp_path:
            raise KeyboardInterrupt

    monkeypatch.setattr("formats.staging.sync", stopped)
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path, rule=anything, said=said)
    assert tree(tmp_path) == {"out/done": b"x"}
    assert not said
