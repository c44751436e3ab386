"""Averages and other vocabularies are carried out as every conversion is: killed and resumed, by several processes, in little
memory."""

from __future__ import annotations

import json
import signal

import pytest

from benchmarks.convert import SHAPES, make_model
from converter import hf_to_mcore
from tests.converter.test_cli import mbconvert
from tests.interrupted import Conversion, make_source, written
from tests.models import tree

COMMANDS = {
    "average": ("average", "one", "other", "m", "--weights", "1,3"),
    "average-mcore": ("average", "one-mcore", "other-mcore", "m", "--weights", "1,3"),
    "extend-vocab": ("extend-vocab", "one", "m", "--to", "1100"),
    "extend-vocab-mcore": ("extend-vocab", "one-mcore", "m", "--to", "1100"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two models large enough to be stopped in the middle, as directories and as checkpoints."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("one", "other"):
        hf_to_mcore(make_source(folder / name), folder / f"{name}-mcore", tp=2, pp=2)
    return folder


@pytest.fixture(params=COMMANDS)
def start(request, sources, tmp_path):
    """Starts a command, as one rank of some; kills it if the test does not."""
    started = []

    def run(*options, log="log", target="m", rank=None, size=1, **how):
        command, *words = COMMANDS[request.param]
        paths = [sources / word if (sources / word).exists() else tmp_path / target if word == "m" else word for word in words]
        env = {"RANK": str(rank), "WORLD_SIZE": str(size)} if rank is not None else None
        started.append(Conversion(command, *paths, *options, log=tmp_path / log, env=env, **how))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_killed_and_resumed_by_several_processes_it_ends_with_the_same_bytes(start, tmp_path):
    assert start(target="straight", log="log-straight", pause=0).end()[0] == 0
    process = start(hold={"write": 20})
    process.until("write", 20)
    assert process.stop()[0] == -signal.SIGKILL
    assert not (tmp_path / "m").exists()
    again = [start("--resume", "--verify", log=f"log-{rank}", rank=rank, size=2, pause=0) for rank in range(2)]
    for rank in again:
        code, output = rank.end()
        assert code == 0, output
    assert again[0].summary["reused_bytes"] > 0
    assert sum(written(tmp_path / f"log-{rank}") != [] for rank in range(2)) == 2
    assert tree(tmp_path / "m") == tree(tmp_path / "straight")


def test_other_weights_are_another_average(sources, tmp_path):
    arguments = "average", sources / "one", sources / "other", tmp_path / "m"
    process = Conversion(*arguments, "--weights", "1,3", log=tmp_path / "log", hold={"write": 20})
    process.until("write", 20)
    process.stop()
    done = mbconvert(*arguments, "--weights", "1,2", "--resume")
    assert done.returncode == 1
    assert "was begun with option `weights`" in done.stderr


def test_memory_does_not_grow_with_the_model(tmp_path):
    make_model(tmp_path / "hf", {**SHAPES["tiny"], "hidden": 2048, "ffn": 8192, "vocab": 16384}, data=False)
    for command in (
        ("average", *[tmp_path / "hf"] * 3, tmp_path / "m"),
        ("extend-vocab", tmp_path / "hf", tmp_path / "n", "--to", 17000),
    ):
        planned, done = (mbconvert(*command, "--json", *more) for more in (["--dry-run"], []))
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert summary["total_bytes"] > 500_000_000
        assert summary["files"] == json.loads(planned.stdout)["files"]
        assert summary["peak_memory"] < min(json.loads(planned.stdout)["peak_memory"], 160 << 20)
