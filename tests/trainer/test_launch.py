"""Jobs: as text, through bash with stand-ins for Slurm's programs, and through NeMo-Run's own local executor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from formats.errors import UserError
from trainer.commands.launch import command
from trainer.launch import Job, pretraining, slurm

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
# SIGTERM 300 s before the time is up: the run saves a checkpoint and ends.
#SBATCH --signal=TERM@300
# Standard output and errors; %x is the job's name, %j its number.
#SBATCH --output=%x-%j.log

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
    -m trainer pretrain llama3_8b train.train_iters=100 'logger.wandb_exp_name=a b'
"""
AWKWARD = ("a=b c", "list=[1,2]", "quote='", 'double="$HOME" `id` \\', "star=*", "+new=1", "~gone", "é=ü", "two\nlines", "")
PLACE = ["--nodes", "2", "--time", "01:30:00", "--partition", "batch", "--account", "team", "--mounts", "/data:/data,/home/me",
         "--container", "nvcr.io/nvidia/pytorch:26.01-py3", "--env", "HF_HOME=/data/my models"]  # fmt: skip


def invoke(*words: str):
    return CliRunner().invoke(command, list(words), catch_exceptions=False)


def test_the_sbatch_script_to_the_letter():
    result = invoke("--slurm", "llama3_8b", *PLACE, "train.train_iters=100", "logger.wandb_exp_name=a b")
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
    job = Job(program=pretraining("tiny", AWKWARD), name="tiny", nodes=2, env={"V": "$HOME 'x' \"y\"\nz"})
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


def _until(path, process):
    """Wait until there is a file."""
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.02)


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
    result = invoke("--slurm", "llama3_8b", *PLACE, "--submit", "train.train_iters=100", "logger.wandb_exp_name=a b")
    assert result.stdout == "4021;cluster\n"
    assert (tmp_path / "received").read_text() == GOLDEN


def test_what_sbatch_refuses_is_told(tmp_path, monkeypatch):
    stand_in(tmp_path, "sbatch", 'echo "sbatch: error: invalid partition" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError) as caught:
        invoke("--slurm", "llama_tiny", "--gpus-per-node", "4", "--submit")
    assert str(caught.value) == (
        "`sbatch` refused the job: sbatch: error: invalid partition\n\nhint: print the script without --submit to see it"
    )


def test_without_sbatch_submitting_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        invoke("--slurm", "llama_tiny", "--gpus-per-node", "4", "--submit")
    assert str(caught.value) == (
        "there is no `sbatch` on this machine\n\nhint: run this on a login node of the cluster, or leave --submit out"
    )


def test_a_name_that_would_break_out_of_its_line_is_refused():
    with pytest.raises(UserError, match="cannot be a job's partition"):
        invoke("--slurm", "llama_tiny", "--gpus-per-node", "4", "--partition", "a\n#SBATCH --nodes=100")
    with pytest.raises(UserError, match="`a b` is not a name of an environment variable"):
        invoke("--slurm", "llama_tiny", "--gpus-per-node", "4", "--env", "a b=1")


def test_one_must_say_how():
    result = invoke("llama_tiny", "--gpus-per-node", "4")
    assert result.exit_code == 2
    assert "say how: --slurm or --nemo-run" in result.output


def test_without_nemo_run_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    with pytest.raises(UserError) as caught:
        invoke("--nemo-run", "llama_tiny", "--gpus-per-node", "4")
    assert str(caught.value) == "NeMo-Run is not installed\n\nhint: pip install 'mbtools[nemo-run]'"


# NeMo-Run warns on import and keeps its home in a global: it gets a process of its own.
LOCAL = """
import json, sys
from trainer.launch import Job, nemo

if __name__ == "__main__":
    out, words = json.loads(sys.argv[1])
    write = "import json, os, sys; open(sys.argv[1] + os.environ['RANK'], 'w').write(json.dumps(sys.argv[2:]))"
    job = Job(program=("-c", write, out, *words), name="tiny", gpus_per_node=2)
    place = nemo.executor(job, where="local")
    assert nemo.launch(nemo.script(job, where="local"), place, name="tiny", submit=True)
    job = Job(program=("-c", "raise SystemExit(3)"), name="bad", gpus_per_node=1)
    assert not nemo.launch(nemo.script(job, where="local"), place, name="bad", submit=True)
"""
FORMS = """
import json, sys
import fiddle
import nemo_run
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
from trainer.launch import Job, nemo

words = json.loads(sys.argv[1])
stored = ZlibJSONSerializer().serialize(nemo.partial("llama3_8b", words))
built = fiddle.build(fiddle.cast(nemo_run.Partial, ZlibJSONSerializer().deserialize(stored)))
assert built.func is nemo.run_recipe
assert built.keywords == {"recipe": "llama3_8b", "overrides": words}, built.keywords
limits = {"nodes": 4, "account": "team", "partition": "batch", "time": "01:30:00"}
job = Job(program=("-c", ""), name="tiny", env={"V": "x y"}, container="c", **limits)
place = nemo.executor(job, where="slurm")
assert (place.nodes, place.gpus_per_node, place.time, place.partition) == (4, 8, "01:30:00", "batch")
assert (place.signal, place.env_vars["V"], place.container_image, place.get_launcher().__class__.__name__) == (
    "TERM@300", "'x y'", "c", "Torchrun")
"""
NO_SBATCH = """
import os
from formats.errors import UserError
from trainer.launch import Job, nemo

job = Job(program=("-c", ""), name="tiny", account="team")
place = nemo.executor(job, where="slurm")
os.environ["PATH"] = "/nowhere"
try:
    nemo.launch(nemo.script(job, where="slurm"), place, name="tiny", submit=True)
except UserError as error:
    assert str(error).startswith("there is no `sbatch` on this machine"), error
else:
    raise AssertionError
"""
NO_ACCOUNT = """
from formats.errors import UserError
from trainer.launch import Job, nemo

try:
    nemo.executor(Job(program=("x",), name="tiny"), where="slurm")
except UserError as error:
    assert str(error) == "NeMo-Run's Slurm executor needs an account\\n\\nhint: --account NAME"
else:
    raise AssertionError
"""


@pytest.fixture(scope="module")
def nemo_run_imports(tmp_path_factory) -> None:
    env = {**os.environ, "NEMORUN_HOME": str(tmp_path_factory.mktemp("nemo"))}
    words = [sys.executable, "-W", "ignore", "-c", "import nemo_run"]
    found = subprocess.run(words, env=env, check=False, capture_output=True, text=True)
    if "No module named 'leptonai" in found.stderr:
        pytest.skip("NeMo-Run 0.11 needs leptonai<0.47, and a later one is installed")
    if "No module named 'nemo_run'" in found.stderr:
        pytest.skip("needs `pip install 'mbtools[nemo-run]'`")
    assert found.returncode == 0, found.stderr


@pytest.fixture
def with_nemo_run(tmp_path, nemo_run_imports):
    """Runs a program that uses NeMo-Run, at home in `tmp_path`."""
    env = {**os.environ, "HOME": str(tmp_path), "NEMORUN_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])

    def run(program: str, argument: object) -> None:
        (tmp_path / "program.py").write_text(program)
        words = [sys.executable, "-W", "ignore", str(tmp_path / "program.py"), json.dumps(argument)]
        done = subprocess.run(words, check=False, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return run


def test_nemo_run_starts_the_program_on_every_rank_with_its_arguments_unchanged(with_nemo_run, tmp_path):
    with_nemo_run(LOCAL, [f"{tmp_path}/rank", AWKWARD])
    assert [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)] == [list(AWKWARD)] * 2


def test_nemo_run_stores_a_recipe_and_its_overrides_and_slurms_numbers(with_nemo_run):
    with_nemo_run(FORMS, list(AWKWARD))


def test_nemo_run_on_slurm_wants_an_account(with_nemo_run):
    with_nemo_run(NO_ACCOUNT, None)


def test_nemo_run_on_slurm_wants_sbatch(with_nemo_run):
    with_nemo_run(NO_SBATCH, None)


@pytest.mark.parametrize("method", ["lora", "none"])
def test_fine_tuning_on_nothing_is_refused_before_it_is_a_job(method):
    done = CliRunner().invoke(command, ["--slurm", "llama3_8b", f"peft={method}"])
    assert "`dataset.path` is not set" in str(done.exception)
    assert CliRunner().invoke(command, ["--slurm", "llama3_8b", f"peft={method}", "dataset.path=there.jsonl"]).exit_code == 0
