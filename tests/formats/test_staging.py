"""Nothing stands at the target before success; a failed run leaves nothing; an old output goes last."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from converter import hf_to_mcore
from formats.errors import UserError
from formats.staging import staged
from tests.models import tree

SLOWLY = """
import runpy, sys, time
from converter.run import Bench

def make(*arguments, make=Bench.make):
    time.sleep(0.05)
    return make(*arguments)

Bench.make = make
sys.argv = sys.argv[1:]
runpy.run_module("converter", run_name="__main__")
"""
"""The converter, with every piece taking fifty milliseconds more."""


def test_the_target_appears_when_the_block_ends_well(tmp_path):
    target, partial = tmp_path / "out", tmp_path / "out.partial-1"
    with staged(target, partial, overwrite=False) as folder:
        assert folder == partial
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("x")
        assert not target.exists()
    assert tree(tmp_path) == {"out/a/b": b"x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    def fail():
        with staged(tmp_path / "out", tmp_path / "p", overwrite=False) as folder:
            (folder / "b").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_replaced(tmp_path):
    (tmp_path / "p" / "deep").mkdir(parents=True)
    (tmp_path / "p" / "deep" / "old").write_text("old")
    with staged(tmp_path / "out", tmp_path / "p", overwrite=False) as folder:
        (folder / "new").write_text("new")
    assert tree(tmp_path) == {"out/new": b"new"}


def test_a_second_run_on_one_target_is_refused_and_harms_nothing(tmp_path):
    with staged(tmp_path / "out", tmp_path / "p", overwrite=False) as folder:
        (folder / "b").write_text("x")
        with pytest.raises(UserError, match="another run is writing"), staged(tmp_path / "out", tmp_path / "p", overwrite=False):
            pass
    assert tree(tmp_path) == {"out/b": b"x"}


def test_a_run_killed_at_any_moment_leaves_no_target_and_the_next_one_succeeds(model_folder, tmp_path):
    folder, target = model_folder("gqa", dtype="bfloat16", max_shard_size="60KB"), tmp_path / "m"
    command = [sys.executable, "-m", "converter", "hf-to-mcore", str(folder), str(target), "--quiet"]
    for wait in (0.0, 0.02, 0.1, 0.2, 0.3):
        process = subprocess.Popen([sys.executable, "-c", SLOWLY, *command[2:]])
        while not list(tmp_path.glob("m.partial-*/*/*.distcp")):
            time.sleep(0.001)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not target.exists()
        assert len([path for path in tmp_path.glob("m.partial-*") if path.is_dir()]) == 1
    hf_to_mcore(folder, target)
    hf_to_mcore(folder, tmp_path / "straight")
    assert tree(target) == tree(tmp_path / "straight")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "straight"]
