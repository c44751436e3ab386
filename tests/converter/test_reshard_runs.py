"""A reshard is carried out as every conversion is: killed and resumed, by several processes, in little memory, into a bucket."""

from __future__ import annotations

import json
import random
import signal
from contextlib import ExitStack

import pytest

from benchmarks.convert import SHAPES, make_model
from benchmarks.reshard import add_state
from converter import hf_to_mcore, reshard, verify
from formats.remote import folder as remote
from tests.converter.test_cli import mbconvert
from tests.converter.test_reshard import RECORDS
from tests.interrupted import PIECE_BYTES, WORKERS, Conversion, journaled, make_source, steps, written
from tests.locations import HURRIED, s3_store
from tests.models import tree

LAYOUT = ("--tp", 4, "--pp", 2)
KILLS = 4
SILENCE = 4.0
"""Seconds after which a rank that is not heard of is dead."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint with optimizer state, large enough to be stopped in the middle."""
    folder = tmp_path_factory.mktemp("source")
    hf_to_mcore(make_source(folder / "hf"), folder / "weights", tp=2, pp=2)
    add_state(folder / "weights", folder / "m")
    return folder / "m"


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    """What a reshard makes undisturbed, how many bytes of pieces it writes, and in how many steps."""
    folder = tmp_path_factory.mktemp("straight")
    assert Conversion("reshard", source, folder / "m", *LAYOUT, log=folder / "log", pause=0).end()[0] == 0
    return tree(folder / "m"), sum(written(folder / "log")), sum(steps(folder / "log").values())


@pytest.fixture
def start(source, tmp_path):
    """Starts a reshard, as one rank of some; kills it if the test does not."""
    started = []

    def run(*options, log="log", rank=None, size=1, **how):
        env = {"RANK": str(rank), "WORLD_SIZE": str(size)} if rank is not None else None
        started.append(Conversion("reshard", source, tmp_path / "m", *LAYOUT, *options, log=tmp_path / log, env=env, **how))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("log"))


def test_killed_again_and_again_it_ends_with_the_same_bytes(start, straight, tmp_path):
    whole, nbytes, nsteps = straight
    at = random.Random(1)
    for _ in range(KILLS):
        taken, before = at.randrange(2, nsteps // KILLS), sum(steps(tmp_path / "log").values())
        process = start("--resume", "--verify", pause=0, hold={"any": taken})
        process.until_total(before + taken)
        assert process.stop()[0] == -signal.SIGKILL
        assert not (tmp_path / "m").exists()
        assert set(journaled(tmp_path / "m").values()) <= {1}, "a piece that was done was done again"
    before = sum(written(tmp_path / "log"))
    process = start("--resume", "--verify", pause=0)
    code, output = process.end()
    assert code == 0, output
    assert tree(tmp_path / "m") == whole
    assert names(tmp_path) == ["m"]
    assert process.summary["reused_bytes"] + sum(written(tmp_path / "log")) - before == nbytes
    assert sum(written(tmp_path / "log")) <= nbytes + KILLS * WORKERS * PIECE_BYTES


def test_with_another_layout_what_was_begun_is_not_resumed(start, source, tmp_path):
    process = start(hold={"write": 20})
    process.until("write", 20)
    process.stop()
    done = mbconvert("reshard", source, tmp_path / "m", "--tp", 2, "--resume")
    assert done.returncode == 1
    assert "was begun with option `" in done.stderr


def test_one_of_several_processes_is_killed_and_another_number_goes_on(start, straight, tmp_path):
    ranks = [
        start(log=f"log-{rank}", rank=rank, size=3, hold={"write": 10} if rank == 1 else None, patience=SILENCE)
        for rank in range(3)
    ]
    ranks[1].until("write", 10)
    ranks[1].stop()
    for rank in (ranks[0], ranks[2]):
        code, output = rank.end()
        assert code == 1
        assert f"error: rank `1` (pid `{ranks[1].pid}` on `" in output
    again = [start("--resume", "--verify", log=f"log-again-{rank}", rank=rank, size=2, pause=0) for rank in range(2)]
    for rank in again:
        code, output = rank.end()
        assert code == 0, output
    assert again[0].summary["reused_bytes"] > 0
    assert tree(tmp_path / "m") == straight[0]
    assert names(tmp_path) == ["m"]


def test_the_number_of_threads_changes_nothing(source, straight, tmp_path):
    for workers in (1, 5):
        reshard(source, tmp_path / str(workers), tp=4, pp=2, workers=workers)
        assert tree(tmp_path / str(workers)) == straight[0]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of half a gigabyte, made of files full of holes."""
    folder = tmp_path_factory.mktemp("large")
    make_model(folder / "hf", {**SHAPES["tiny"], "hidden": 2048, "ffn": 8192, "vocab": 16384}, data=False)
    hf_to_mcore(folder / "hf", folder / "m", tp=2, integrity=False)
    return folder / "m"


def test_memory_does_not_grow_with_the_model(large, tmp_path):
    arguments = "reshard", large, tmp_path / "m", "--tp", 4, "--pp", 4, "--json"
    planned = json.loads(mbconvert(*arguments, "--dry-run").stdout)
    done = mbconvert(*arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["total_bytes"] > 500_000_000
    assert summary["files"] == planned["files"]
    assert summary["layout"] == planned["layout"] == {"tp": 4, "pp": 4, "vpp": 1}
    assert summary["peak_memory"] < min(planned["peak_memory"], 128 << 20)


@pytest.mark.usefixtures("at_home")
def test_from_a_bucket_into_a_bucket_it_makes_the_same_files(source, straight, tmp_path, monkeypatch, moto):
    monkeypatch.setattr(remote, "RetryPolicy", lambda: HURRIED)
    with ExitStack() as stack:
        store = s3_store(stack, monkeypatch, moto)
        for name, data in tree(source).items():
            store.put(f"before/{name}", data)
        reshard(f"{store.url}/before", f"{store.url}/after", tp=4, pp=2)
        made = {name.removeprefix("after/"): data for name, data in store.objects().items() if name.startswith("after/")}
        assert verify(f"{store.url}/after", source).same
    assert {name for name in made.keys() | straight[0].keys() if made.get(name) != straight[0].get(name)} == RECORDS
