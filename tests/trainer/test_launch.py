"""Jobs as sbatch scripts: as text, and through bash with stand-ins for Slurm's programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from formats.errors import UserError
from tests.trainer.jobs import AWKWARD, invoke
from trainer import launch
from trainer.arguments import read_run
from trainer.commands.launch import command
from trainer.launch import Job, pretrain_program, slurm

GOLDEN = """\
#!/bin/bash
#SBATCH --job-name=llama3_8b
#SBATCH --nodes=2
# One torchrun per node; it starts one process per GPU.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# Whole nodes: all their CPUs and memory.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=01:30:00
#SBATCH --partition=batch
#SBATCH --account=team
# 300 s before the time is up this script gets SIGUSR1: see `stop` below.
#SBATCH --signal=B:USR1@300
# The job may go back into the queue; after a node has failed, Slurm puts it there.
#SBATCH --requeue
# Standard output and errors, of all starts; %x is the job's name, %j its number.
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

# A command that fails, or a variable that is missing, ends the job.
set -euo pipefail

# The processes meet on the first node; the port differs between jobs that share it.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 10000))

# torchrun gives workers this long to save after SIGTERM; without it, 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270
# One thread per process for CPU arithmetic; more get in each other's way.
export OMP_NUM_THREADS=1
# NCCL says why, when a connection fails.
export NCCL_DEBUG=WARN
# The log shows lines when they are printed.
export PYTHONUNBUFFERED=1
export HF_HOME='/data/my models'

# When the time is nearly up the ranks are signalled to save and end. The job then goes back into the queue, to go on from there.
stopping=
stop() { stopping=1; scancel --signal=TERM "$SLURM_JOB_ID" || true; }
trap stop USR1

# A rank that fails ends the job. Slurm would bind a node's one task, and with it all workers, to one core.
srun --kill-on-bad-exit=1 --cpu-bind=none \\
    --container-image=nvcr.io/nvidia/pytorch:26.01-py3 \\
    --container-mounts=/data:/data,/home/me \\
    torchrun \\
    --nnodes=2 \\
    --nproc-per-node=8 \\
    --rdzv-id="$SLURM_JOB_ID" \\
    --rdzv-backend=c10d \\
    --rdzv-endpoint="$first_node:$port" \\
    -m trainer pretrain llama3_8b train.train_iters=100 'logger.wandb_exp_name=a b' checkpoint.save=run checkpoint.load=run &
step=$! code=0
wait "$step" || code=$?
# The signal ends the first `wait`; the second waits for the save.
if [ -n "$stopping" ]; then
    code=0
    wait "$step" || code=$?
    [ "$code" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
PLACE = ["--nodes", "2", "--time", "01:30:00", "--partition", "batch", "--account", "team", "--mounts", "/data:/data,/home/me",
         "--container", "nvcr.io/nvidia/pytorch:26.01-py3", "--env", "HF_HOME=/data/my models"]  # fmt: skip

SETTINGS = ("train.train_iters=100", "logger.wandb_exp_name=a b", "checkpoint.save=run")


def test_the_sbatch_script_to_the_letter():
    result = invoke("--slurm", "llama3_8b", *PLACE, *SETTINGS)
    assert (result.exit_code, result.stdout) == (0, GOLDEN)
    assert subprocess.run(["bash", "-n"], check=False, input=GOLDEN, text=True, capture_output=True).stderr == ""


def stand_in(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def test_arguments_and_variables_reach_the_program_unchanged(tmp_path):
    programs = tmp_path / "programs"
    stand_in(programs, "scontrol", '[ "$*" = "show hostnames node[07-08]" ] && printf "node07\\nnode08\\n"')
    stand_in(programs, "srun", 'while [[ $1 == -* ]]; do shift; done; exec "$@"')
    show = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['V']]))"
    stand_in(programs, "torchrun", f'exec {sys.executable} -c "{show}" "$@"')
    job = Job(program=pretrain_program("tiny", AWKWARD), name="tiny", nodes=2, env={"V": "$HOME 'x' \"y\"\nz"})
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_ID": "4021234"}
    done = subprocess.run(["bash"], check=False, input=slurm.script(job), text=True, capture_output=True, env=env, timeout=600)
    assert done.stderr == ""
    argv, variable = json.loads(done.stdout)
    assert argv[:5] == [
        "--nnodes=2",
        "--nproc-per-node=8",
        "--rdzv-id=4021234",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node07:21234",
    ]
    assert argv[5:] == ["-m", "trainer", "pretrain", "tiny", *AWKWARD]
    assert variable == "$HOME 'x' \"y\"\nz"


@pytest.mark.parametrize("word", ["checkpoint.save=/data/run-1", "checkpoint.save=~/run", "++checkpoint.save='a b, [c] #d'"])
def test_a_job_goes_on_from_where_it_saves(word):
    """Also where the home directory is another one in the job."""
    words = ("checkpoint.save=x", word)
    checkpoint = read_run("llama_tiny", overrides=words).checkpoint
    again = launch.resumable(checkpoint, words)
    assert again == (*words, word.lstrip("+").replace("save", "load"))
    assert read_run("llama_tiny", overrides=again).checkpoint.load == checkpoint.save
    assert read_run("llama_tiny", overrides=launch.resumable(checkpoint, ())).checkpoint.load == checkpoint.save
    checkpoint.load = "elsewhere"
    assert launch.resumable(checkpoint, words) == words


def test_a_job_that_would_lose_what_it_has_trained_is_refused(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "iter_0000003").mkdir()
    refused = {
        "train.train_iters=3": (
            "`checkpoint.save` is not set: when its time is up, the job would have saved nothing\n\n"
            "hint: name a folder that all nodes share: `checkpoint.save=DIRECTORY`"
        ),
        f"checkpoint.save={tmp_path}": (
            f"`checkpoint.save` is `{tmp_path}`, which holds `iter_0000003` of another run, and this one starts anew: it would "
            f"overwrite that\n\nhint: resume that run with `checkpoint.load={tmp_path}`, save to another folder, or set "
            "`checkpoint.overwrite=true` to replace it"
        ),
        "checkpoint.overwrite=true": (
            "`checkpoint.overwrite` is `True`: a job that is put back into the queue would begin anew each time\n\n"
            "hint: leave it out, and save to a new folder"
        ),
    }
    for word, text in refused.items():
        words = ["checkpoint.save=run", word] if "overwrite" in word else [word]
        with pytest.raises(UserError) as caught:
            invoke("--slurm", "llama_tiny", "--gpus-per-node", "4", *words)
        assert str(caught.value) == text


def _until(path, process):
    """Wait until there is a file."""
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.02)


WORK = """\
trap 'echo saved >> {0}/said; exit 1' TERM
echo $$ > {0}/ranks
for (( n = 0; n < 600; n++ )); do sleep 0.1; [ ! -e {0}/end ] || exit $(cat {0}/end); done
"""


@pytest.mark.parametrize(
    ("ends", "signalled", "code", "logged"),
    [(None, True, 1, ["saved", "requeue 4021234"]), ("0", False, 0, []), ("3", False, 3, []), ("0", True, 0, [])],
)
def test_a_job_whose_time_is_up_saves_and_goes_back_into_the_queue(ends, signalled, code, logged, tmp_path):
    """And one that is done, or has failed, does not. Slurm's programs are stand-ins; bash runs the script."""
    programs, log = tmp_path / "programs", tmp_path / "said"
    log.touch()
    stand_in(programs, "scontrol", f'[ "$1" = show ] && echo node07 || echo "$*" >> {log}')
    stand_in(programs, "srun", 'while [[ $1 == -* ]]; do shift; done; exec "$@"')
    stand_in(programs, "torchrun", WORK.format(tmp_path))
    how = "kill -TERM" if ends is None else f"echo {ends} > {tmp_path}/end; true"
    stand_in(programs, "scancel", f'[ "$*" = "--signal=TERM 4021234" ] && {how} $(cat {tmp_path}/ranks)')
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node07", "SLURM_JOB_ID": "4021234"}
    job = subprocess.Popen(["bash", "-c", slurm.script(Job(program=("-m", "trainer"), name="tiny"))], env=env)
    _until(tmp_path / "ranks", job)
    if signalled:
        job.send_signal(signal.SIGUSR1)
    else:
        (tmp_path / "end").write_text(ends)
    assert job.wait(60) == code
    assert log.read_text().splitlines() == logged


# A checkpoint that takes until there is a file, after the signal.
SLOW = """
import os, sys, time
from trainer.signals import Stop
with Stop() as stop:
    open(sys.argv[1] + ".up", "w").close()
    while not stop.requested:
        time.sleep(0.02)
    open(sys.argv[1] + ".saving", "w").close()
    while not os.path.exists(sys.argv[1] + ".disk"):
        time.sleep(0.02)
    open(sys.argv[1], "w").close()
"""


@pytest.mark.slow
def test_torchrun_gives_workers_the_time_that_the_script_asks_for(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    running = {}
    for grace in ("1", "3600"):
        variables = {
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": grace,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1",
        }
        words = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=1",
            str(tmp_path / "slow.py"),
            str(tmp_path / grace),
        ]
        running[grace] = subprocess.Popen(words, env={**os.environ, **variables}, stderr=subprocess.DEVNULL)
    for grace, torchrun in running.items():
        _until(tmp_path / f"{grace}.up", torchrun)
        torchrun.terminate()
        if grace != "1":
            _until(tmp_path / f"{grace}.saving", torchrun)
            (tmp_path / f"{grace}.disk").touch()
        torchrun.wait()
    assert [(tmp_path / grace).exists() for grace in running] == [False, True]


def test_submitting_prints_the_jobs_number(tmp_path, monkeypatch):
    stand_in(tmp_path, "sbatch", f'[ "$*" = --parsable ] && cat > {tmp_path}/received && echo "4021;cluster"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    result = invoke("--slurm", "llama3_8b", *PLACE, "--submit", *SETTINGS)
    assert result.stdout == "4021;cluster\n"
    assert (tmp_path / "received").read_text() == GOLDEN


def test_what_sbatch_refuses_is_told(tmp_path, monkeypatch):
    stand_in(tmp_path, "sbatch", 'echo "sbatch: error: invalid partition" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError) as caught:
        invoke("--slurm", "llama_tiny", "checkpoint.save=run", "--gpus-per-node", "4", "--submit")
    assert str(caught.value) == (
        "`sbatch` refused the job: sbatch: error: invalid partition\n\nhint: print the script without --submit to see it"
    )


def test_without_sbatch_submitting_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        invoke("--slurm", "llama_tiny", "checkpoint.save=run", "--gpus-per-node", "4", "--submit")
    assert str(caught.value) == (
        "there is no `sbatch` on this machine\n\nhint: run this on a login node of the cluster, or leave --submit out"
    )


def test_a_name_that_would_break_out_of_its_line_is_refused():
    with pytest.raises(UserError, match="cannot be a job's partition"):
        invoke("--slurm", "llama_tiny", "checkpoint.save=run", "--gpus-per-node", "4", "--partition", "a\n#SBATCH --nodes=100")
    with pytest.raises(UserError, match="`a b` is not a name of an environment variable"):
        invoke("--slurm", "llama_tiny", "checkpoint.save=run", "--gpus-per-node", "4", "--env", "a b=1")


def test_one_must_say_how():
    result = invoke("llama_tiny", "--gpus-per-node", "4")
    assert result.exit_code == 2
    assert "say how: --slurm or --nemo-run" in result.output


@pytest.mark.parametrize("method", ["lora", "none"])
def test_fine_tuning_on_nothing_is_refused_before_it_is_a_job(method):
    done = CliRunner().invoke(command, ["--slurm", "llama3_8b", f"peft={method}"])
    assert "`dataset.path` is not set" in str(done.exception)
    assert (
        CliRunner()
        .invoke(command, ["--slurm", "llama3_8b", f"peft={method}", "dataset.path=there.jsonl", "checkpoint.save=run"])
        .exit_code
        == 0
    )
