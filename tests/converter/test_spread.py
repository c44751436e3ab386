"""Several processes convert one checkpoint into one place: one process's bytes, and nobody waits for the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from converter import hf_to_mcore, mcore_to_hf
from tests.interrupted import ROOT, Conversion, journaled, make_source, partial
from tests.models import tree

TORCHRUN, SRUN = ("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
OPTIONS = ("--tp", 2, "--pp", 2)
SILENCE = 4.0
"""Seconds after which a rank that is not heard of is dead. A living one says something 30 times in it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("spread") / "hf")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """What one process makes, by whether it writes hashes."""
    folder = tmp_path_factory.mktemp("whole")
    for integrity in (True, False):
        hf_to_mcore(model, folder / str(integrity), tp=2, pp=2, integrity=integrity)
    return {integrity: tree(folder / str(integrity)) for integrity in (True, False)}


@pytest.fixture
def start(model, tmp_path):
    """Starts all ranks of a conversion; ends those that the test does not."""
    started = []

    def run(size, *options, command=("hf-to-mcore", model, tmp_path / "m", *OPTIONS), names=TORCHRUN, hold=None, **how):
        """`hold` has, by rank, at which steps it waits."""
        logs = [tmp_path / f"log-{len(started) + rank}" for rank in range(size)]
        envs = [{names[0]: str(rank), names[1]: str(size)} for rank in range(size)]
        ranks = [
            Conversion(*command, *options, log=logs[rank], env=envs[rank], hold=(hold or {}).get(rank), **how)
            for rank in range(size)
        ]
        started.extend(ranks)
        return ranks

    yield run
    for process in started:
        process.kill()
        process.communicate()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("log"))


def finish(ranks):
    for rank in ranks:
        code, output = rank.end()
        assert code == 0, output


@pytest.mark.parametrize(
    ("engine", "options"),
    [(TORCHRUN, ()), (SRUN, ("--verify",)), (SRUN, ("--no-integrity",)), (TORCHRUN, ("--no-integrity", "--verify"))],
    ids=str,
)
def test_ranks_make_the_bytes_that_one_process_makes(start, whole, tmp_path, engine, options):
    size = 3 if "--verify" in options else 2
    ranks = start(size, *options, names=engine, pause=0)
    finish(ranks)
    assert tree(tmp_path / "m") == whole["--no-integrity" not in options]
    assert names(tmp_path) == ["m"]
    assert ranks[0].summary["verified"] == ("--verify" in options)
    assert [rank.summary for rank in ranks[1:]] == [{}] * (size - 1)


def test_ranks_export_the_bytes_that_one_process_exports(start, model, tmp_path):
    source = tmp_path / "log-megatron"
    hf_to_mcore(model, source, tp=2, pp=2)
    mcore_to_hf(source, tmp_path / "log-back")
    finish(start(2, "--verify", command=("mcore-to-hf", source, tmp_path / "m"), pause=0))
    assert tree(tmp_path / "m") == tree(tmp_path / "log-back")


@pytest.mark.parametrize(
    "case",
    [(1, 3, ()), (0, 2, ("--no-integrity",)), (2, 1, ("--verify",)), (1, 4, ("--no-integrity", "--verify"))],
    ids=str,
)
def test_a_killed_rank_is_named_and_any_number_of_ranks_goes_on(start, whole, tmp_path, case):
    """One dies while it writes, or where all are to read back what they wrote."""
    dead, again, options = case
    step, number = ("compare", 1) if "--verify" in options else ("write", 10)
    ranks = start(3, *options, hold={dead: {step: number}}, patience=SILENCE)
    ranks[dead].until(step, number)
    ranks[dead].stop()
    for rank in ranks:
        code, output = rank.end()
        if rank is not ranks[dead]:
            assert code == 1
            assert f"error: rank `{dead}` (pid `{ranks[dead].pid}` on `" in output
            assert "is dead" in output
            assert "`--resume`" in output
            assert "Traceback" not in output
    assert set(journaled(tmp_path / "m").values()) == {1}
    ranks = start(again, "--resume", *options, pause=0)
    finish(ranks)
    assert ranks[0].summary["reused_bytes"] > 0
    assert tree(tmp_path / "m") == whole["--no-integrity" not in options]
    assert names(tmp_path) == ["m"]


def test_a_rank_that_is_stopped_is_named_and_all_stop_at_once(start, whole, tmp_path):
    ranks = start(2, pauses={"write": 0.1}, hold={0: {"write": 10}})
    for rank in ranks:
        rank.until("write", 5)
    assert ranks[1].stop(signal.SIGTERM)[0] == 143
    ranks[0].release()
    code, output = ranks[0].end()
    assert code == 1
    assert f"error: rank `1` (pid `{ranks[1].pid}` on `" in output
    assert "was stopped" in output
    left = partial(tmp_path / "m")
    assert f"`{left}` keeps what is done" in output
    assert names(tmp_path) == [left.name, f"{left.name}.state"]
    finish(start(1, "--resume", pause=0))
    assert tree(tmp_path / "m") == whole[True]


def test_all_ranks_refuse_what_an_interrupted_run_left(start, tmp_path):
    ranks = start(2, hold={0: {"write": 10}})
    ranks[0].until("write", 10)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.end()
    for rank in start(2, pause=0):
        code, output = rank.end()
        assert code == 1
        assert f"an interrupted run left `{partial(tmp_path / 'm')}`" in output


def test_a_batch_script_is_one_process(start, whole, tmp_path):
    (alone,) = start(1, names=("SLURM_PROCID", "SLURM_NTASKS"), pause=0)
    finish([alone])
    assert tree(tmp_path / "m") == whole[True]


WITNESS = """
import atexit, os, sys
from pathlib import Path

if "RANK" in os.environ:
    heavy = {"torch", "numpy", "converter"}
    said = Path(os.environ["WITNESS"], os.environ["RANK"])
    atexit.register(lambda: said.write_text(" ".join(sorted(heavy & sys.modules.keys()))))
"""


def test_torchrun_starts_it_and_no_worker_imports_torch(model, whole, tmp_path):
    witness = tmp_path / "witness"
    witness.mkdir()
    (witness / "sitecustomize.py").write_text(WITNESS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "converter"]
    arguments = ["hf-to-mcore", model, tmp_path / "m", *OPTIONS, "--verify"]
    env = {**os.environ, "WITNESS": str(witness), "PYTHONPATH": os.pathsep.join([str(witness), str(ROOT)])}
    done = subprocess.run([*torchrun, *map(str, arguments)], capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done, verified") == 1
    assert [(witness / rank).read_text() for rank in "01"] == ["converter numpy"] * 2
    assert tree(tmp_path / "m") == whole[True]
