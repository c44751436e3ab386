"""Which rank a process is, from what torchrun and srun set; and a division of the work that covers it once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter import console, hf_to_mcore
from converter.ranks import Ranks, from_environment, share, waiting
from formats.errors import UserError

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
}  # fmt: skip
SRUN = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "6"}
HOW = {"as_json": False, "quiet": False, "dry_run": False}
BATCH_SCRIPT = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8"}


@pytest.mark.parametrize(
    ("env", "rank", "size"),
    [(TORCHRUN, 3, 4), (SRUN, 5, 6), ({**SRUN, **TORCHRUN}, 3, 4), (BATCH_SCRIPT, 0, 1), ({}, 0, 1)],
    ids=["torchrun", "srun", "torchrun in srun", "batch script", "alone"],
)
def test_who_a_process_is_comes_from_what_its_engine_set(env, rank, size):
    ranks = from_environment(env)
    assert (ranks.rank, ranks.size) == (rank, size)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", ranks.run_id)


@pytest.mark.parametrize("engine", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_all_ranks_of_a_run_have_its_id(engine):
    first = {**engine, "LOCAL_RANK": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "HOSTNAME": "node-2"}
    assert from_environment(engine).run_id == from_environment(first).run_id


@pytest.mark.parametrize(
    ("engine", "changed"),
    [
        (TORCHRUN, {"TORCHELASTIC_RUN_ID": "1a2b"}),
        (TORCHRUN, {"TORCHELASTIC_RESTART_COUNT": "1"}),
        (TORCHRUN, {"MASTER_PORT": "29501"}),
        (TORCHRUN, {"TORCHELASTIC_RUN_ID": "a/b"}),
        (SRUN, {"SLURM_JOB_ID": "78"}),
        (SRUN, {"SLURM_STEP_ID": "3"}),
        (SRUN, {"SLURM_RESTART_COUNT": "1"}),
    ],
)
def test_another_run_has_another_id(engine, changed):
    assert from_environment(engine).run_id != from_environment({**engine, **changed}).run_id


def test_two_processes_alone_are_two_runs():
    assert from_environment({}).run_id != from_environment({}).run_id


@pytest.mark.parametrize("name", ["a/b", "a b", "é", "x" * 300, "../.."])
def test_any_name_of_a_run_is_fit_for_a_file(name):
    run_id = from_environment({**TORCHRUN, "TORCHELASTIC_RUN_ID": name}).run_id
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,100}", run_id)


def test_ranks_without_torchelastic_share_an_id_though_rank_0_calls_itself_localhost():
    first, second = ({"RANK": str(n), "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": "1"} for n, host in enumerate("ab"))
    assert from_environment(first).run_id == from_environment(second).run_id


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "`RANK` is `4` and `WORLD_SIZE` is `4`"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "`RANK` is `-1`"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "`RANK` is `one`"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "`WORLD_SIZE` is ``"),
        ({"RANK": "0"}, "`WORLD_SIZE` is not set"),
        ({"WORLD_SIZE": "2", **SRUN}, "`RANK` is not set"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "`SLURM_PROCID` is not set and `SLURM_STEP_NUM_TASKS` is `2`"),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "2"}, "`SLURM_PROCID` is `2`"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name_and_value(env, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        from_environment(env)
    assert "unset" in caught.value.hint


MEET = """
import sys
from pathlib import Path
from converter.ranks import from_environment
from formats.rendezvous import Rendezvous

ranks, target = from_environment(), Path(sys.argv[1])
with Rendezvous(target / "ranks", ranks.rank, ranks.size, ranks.run_id, target=target / "out") as together:
    together.arrive("written", {"rank": ranks.rank})
    print(together.wait("written"))
    together.arrive("read")
    together.wait("read")
"""


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")], ids=str)
def test_processes_that_have_the_variables_set_find_one_another(tmp_path, names):
    command = [sys.executable, "-c", MEET, str(tmp_path)]
    envs = [{**os.environ, names[0]: str(rank), names[1]: "2"} for rank in range(2)]
    started = [subprocess.Popen(command, cwd=Path(__file__).parents[2], env=env, stdout=subprocess.PIPE) for env in envs]
    outputs = [process.communicate(timeout=900)[0] for process in started]
    assert outputs == [b"[{'rank': 0}, {'rank': 1}]\n"] * 2
    assert not list(tmp_path.iterdir())


@given(st.lists(st.one_of(st.just(0), st.integers(0, 10**13)), max_size=60), st.integers(1, 70))
def test_shares_cover_each_item_once_and_are_even_but_for_one_item(weights, size):
    shares = [share(weights, rank, size) for rank in range(size)]
    assert [index for part in shares for index in range(part.start, part.stop)] == list(range(len(weights)))
    assert all(size * sum(weights[part]) <= sum(weights) + size * max(weights, default=0) for part in shares)


@given(st.integers(1, 50), st.integers(0, 40), st.integers(1, 20))
def test_items_of_one_size_are_dealt_out_evenly(weight, count, size):
    for weights in ([weight] * count, [0] * count):
        dealt = [len(range(count)[share(weights, rank, size)]) for rank in range(size)]
        assert max(dealt) - min(dealt) <= 1


LONE = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}
IN_STEP = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}


@pytest.mark.parametrize(
    ("env", "words", "names"),
    [
        (LONE, "rank 0 of 4: waiting for ranks 1–3", ["RANK", "WORLD_SIZE"]),
        ({**LONE, "RANK": "3"}, "rank 3 of 4: waiting for rank 0", ["RANK", "WORLD_SIZE"]),
        ({**LONE, "WORLD_SIZE": "2"}, "rank 0 of 2: waiting for rank 1", ["RANK", "WORLD_SIZE"]),
        (IN_STEP, "rank 2 of 3: waiting for rank 0", ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS"]),
    ],
)
def test_who_waits_says_for_whom_and_which_variables_made_it_wait(env, words, names):
    first, second = names
    assert waiting(from_environment(env), env) == (
        f"{words} ({first}, {second} are set); to convert with this process alone: `env -u {first} -u {second} mbconvert …`"
    )


@pytest.mark.parametrize("env", [TORCHRUN, {"RANK": "0", "WORLD_SIZE": "1"}, {}], ids=["torchrun", "one", "alone"])
def test_nothing_is_said_where_the_others_are_on_their_way_or_there_are_none(env):
    assert waiting(from_environment(env), env) == ""


def test_a_lone_shell_with_the_variables_set_hears_so_before_it_waits(capsys, monkeypatch):
    """The note comes before the conversion begins, whichever rank the shell is."""
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "4")
        for options, noted in (({}, True), ({"dry_run": True}, False), ({"quiet": True}, False)):
            with pytest.raises(UserError, match="does not exist"):
                console.convert(hf_to_mcore, "/nowhere", "/never", **{**HOW, **options})
            words = f"note: {waiting(Ranks(int(rank), 4, 'x'), LONE)}\n" if noted else ""
            assert capsys.readouterr().err == words
