"""`srun … mbtrain pretrain …`, without torchrun: processes find one another by what Slurm says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys

import pytest

from formats.errors import UserError
from trainer import device, parallel
from trainer.cli import main

TASK = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[01-08]",
}


def _scontrol(folder, text):
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    return str(folder)


def test_a_task_of_slurm_gets_what_torchrun_would_say(tmp_path):
    path = _scontrol(tmp_path, '[ "$*" = "show hostnames gpu[07-08]" ] && echo gpu07 && echo gpu08')
    assert parallel.slurm_variables({**TASK, "PATH": path}) == {
        "RANK": "11",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "23458",
    }


def test_one_node_needs_no_scontrol():
    assert parallel.slurm_variables({**TASK, "SLURM_STEP_NODELIST": "gpu07", "PATH": ""})["MASTER_ADDR"] == "gpu07"


def test_an_address_that_was_set_is_kept():
    variables = parallel.slurm_variables({**TASK, "PATH": "", "MASTER_ADDR": "head", "MASTER_PORT": "999"})
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("head", "999")


@pytest.mark.parametrize(("installed", "why"), [(False, "is not installed here"), (True, "failed")])
def test_hosts_that_cannot_be_told_apart_are_an_error(installed, why, tmp_path):
    path = _scontrol(tmp_path, "exit 1") if installed else ""
    with pytest.raises(UserError) as refused:
        parallel.slurm_variables({**TASK, "PATH": path})
    assert str(refused.value) == (
        f"cannot find the first host of Slurm's `gpu[07-08]`: `scontrol show hostnames` {why}\n\n"
        "hint: set `MASTER_ADDR` to that host before `srun`, or start with torchrun"
    )


def test_torchrun_inside_slurm_is_left_alone(monkeypatch):
    for name, value in {**TASK, "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    parallel.adopt_slurm()
    assert parallel.world_size() == 2
    assert os.environ["RANK"] == "0"


def test_a_batch_script_outside_srun_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[01-08]")
    parallel.adopt_slurm()
    assert parallel.world_size() == 1
    assert "RANK" not in os.environ


@pytest.mark.parametrize(("local", "visible", "gpu"), [(0, 8, 0), (7, 8, 7), (3, 1, 0)])
def test_a_process_takes_its_own_gpu_also_where_slurm_shows_it_only_that(local, visible, gpu):
    assert device._gpu(local, visible=visible) == gpu


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(UserError) as refused:
        device._gpu(2, visible=2)
    assert str(refused.value) == (
        "this process is number `2` on its host, and it sees `2` GPUs\n\n"
        "hint: start as many processes on each host as it has GPUs"
    )


def _pretrain(folder, arguments):
    """As srun starts it: told by variables alone which task this is."""
    task = os.environ["RANK"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        del os.environ[name]
    os.environ |= {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": task,
        "SLURM_LOCALID": task,
        "SLURM_STEP_NODELIST": "localhost",
    }
    sys.argv = ["mbtrain", "pretrain", "llama_tiny", *arguments]
    with (folder / task).open("w") as heard, contextlib.redirect_stderr(heard):
        main(standalone_mode=False)


def test_two_tasks_train_together(tmp_path, ranks):
    arguments = ["train.train_iters=2", "train.micro_batch_size=4", "dataset.sequence_length=16", "validation.eval_iters=0"]
    arguments += ["logger.log_interval=1", f"logger.run_dir={tmp_path}", "dataset.num_workers=0", "dist.device=cpu"]
    ranks.run(_pretrain, 2, tmp_path, arguments)
    heard = [(tmp_path / task).read_text() for task in "01"]
    assert [len(re.findall(r"^step ", text, re.MULTILINE)) for text in heard] == [0, 2]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2]


MEET = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
WAYS_OUT = "start all processes with torchrun, or unset `RANK` and `WORLD_SIZE` to train in this one alone"
BOTH = f"{WAYS_OUT}; or set both to rank 0's host and a free port of it"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, f"`MASTER_ADDR` and `MASTER_PORT` are not set: the processes cannot connect\n\nhint: {BOTH}"),
        ({"MASTER_ADDR": "a"}, f"`MASTER_PORT` is not set: the processes cannot connect\n\nhint: {BOTH}"),
        ({"MASTER_PORT": "1"}, f"`MASTER_ADDR` is not set: the processes cannot connect\n\nhint: {BOTH}"),
        ({**MEET, "MASTER_PORT": "x"}, "`MASTER_PORT` is `x`, which is not a port\n\nhint: set it to a number up to 65535; or"),
        ({**MEET, "MASTER_PORT": "65536"}, "`MASTER_PORT` is `65536`, which is not a port\n\n"),
    ],
)  # fmt: skip
def test_several_processes_that_do_not_know_where_to_meet_are_told(variables, message):
    with pytest.raises(UserError) as refused:
        parallel.check_rendezvous({"RANK": "0", "WORLD_SIZE": "2", **variables})
    assert message in str(refused.value)


@pytest.mark.slow
def test_a_command_that_is_one_of_several_and_has_no_port_says_so(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_PORT"}
    environment |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    command = [sys.executable, "-m", "trainer", "pretrain", "llama_tiny", "dist.device=cpu", f"logger.run_dir={tmp_path / 'run'}"]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (completed.returncode, completed.stdout) == (1, "")
    message = "`WORLD_SIZE` is `2`, and `MASTER_PORT` is not set: the processes cannot connect"
    assert completed.stderr == f"error: {message}\n\nhint: {BOTH}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "2", **MEET}, MEET])
def test_one_process_needs_no_place_to_meet(variables):
    parallel.check_rendezvous(variables)


@pytest.mark.filterwarnings("ignore")  # megatron-core's own, which commands do not show
def test_one_process_of_a_cluster_trains_alone(monkeypatch, tmp_path):
    from trainer import loop, recipes

    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = recipes.find("llama_tiny").pretrain_config()
    config.model.num_layers = config.train.train_iters = 1
    config.train.global_batch_size, config.dataset.sequence_length, config.dataset.num_workers = 2, 16, 0
    config.validation.eval_iters, config.dist.device = 0, "cpu"
    assert loop.pretrain(config).iteration == 1


def test_a_number_on_this_host_that_is_none_is_named():
    with pytest.raises(UserError, match="`LOCAL_RANK` is `x`, which is not the number of a process on its host"):
        device.local_rank({"LOCAL_RANK": "x"})
    assert device.local_rank({}) == 0


@pytest.mark.parametrize(
    ("size", "nproc", "starts"), [("1", 2, True), ("2", 2, False), ("2", None, False), ("2", 1, False), ("1", 1, False)]
)
def test_a_process_that_is_one_of_several_starts_no_others(monkeypatch, size, nproc, starts):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", size)
    assert parallel.starts_others(nproc) is starts


def test_a_number_of_processes_that_is_not_that_of_those_started_is_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="`--nproc` is `4`, and this is one of `2` processes that were started already"):
        parallel.starts_others(4)
