"""An sbatch script for a job: torchrun on every node, meeting on the first. Text in, text out; and handing it to sbatch."""

from __future__ import annotations

import shlex
import shutil
import subprocess

from formats.errors import UserError
from trainer.launch import Job

# `sed` reads to the end. `head` leaves early: `scontrol` may then end by SIGPIPE, and by `pipefail` the job with it.
_SETUP = """\
# A command that fails, or a variable that is missing, ends the job.
set -euo pipefail

# The processes meet on the first node; the port differs between jobs that share it.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 10000))

# torchrun gives workers this long to save after SIGTERM; without it, 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={grace}
# One thread per process for CPU arithmetic; more get in each other's way.
export OMP_NUM_THREADS=1
# NCCL says why, when a connection fails.
export NCCL_DEBUG=WARN
# The log shows lines when they are printed.
export PYTHONUNBUFFERED=1
"""

_STOP = """\
# When the time is nearly up the ranks are told to save and end. The job then goes back into the queue, to go on from there.
stopping=
stop() { stopping=1; scancel --signal=TERM "$SLURM_JOB_ID" || true; }
trap stop USR1

"""
_WAIT = """\
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


def script(job: Job) -> str:
    """The sbatch script, with a comment for each line that is not obvious. Arguments reach the program unchanged."""
    own = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.env.items())
    setup = _SETUP.format(grace=max(job.stop_before - 30, 1))
    return f"#!/bin/bash\n{_directives(job)}\n{setup}{own}\n{_launch(job)}"


def _directives(job: Job) -> str:
    lines = [
        f"#SBATCH --job-name={job.name}",
        f"#SBATCH --nodes={job.nodes}",
        "# One torchrun per node; it starts one process per GPU.",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={job.gpus_per_node}",
        "# Whole nodes: all their CPUs and memory.",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
        f"#SBATCH --time={job.time}",
        *([f"#SBATCH --partition={job.partition}"] if job.partition else []),
        *([f"#SBATCH --account={job.account}"] if job.account else []),
        f"# {job.stop_before} s before the time is up this script gets SIGUSR1: see `stop` below.",
        f"#SBATCH --signal=B:USR1@{job.stop_before}",
        "# The job may go back into the queue; after a node has failed, Slurm puts it there.",
        "#SBATCH --requeue",
        "# Standard output and errors, of all starts; %x is the job's name, %j its number.",
        "#SBATCH --output=%x-%j.log",
        "#SBATCH --open-mode=append",
    ]
    return "\n".join(lines) + "\n"


def _launch(job: Job) -> str:
    parts = [
        # `--cpu-bind=none`: Slurm would bind the one task of a node to one core, and with it all its workers.
        "srun --kill-on-bad-exit=1 --cpu-bind=none",
        *([f"--container-image={shlex.quote(job.container)}"] if job.container else []),
        *([f"--container-mounts={shlex.quote(job.mounts)}"] if job.mounts else []),
        "torchrun",
        f"--nnodes={job.nodes}",
        f"--nproc-per-node={job.gpus_per_node}",
        '--rdzv-id="$SLURM_JOB_ID"',
        "--rdzv-backend=c10d",
        '--rdzv-endpoint="$first_node:$port"',
        shlex.join(job.program),
    ]
    why = "# A rank that fails ends the job. Slurm would bind a node's one task, and with it all workers, to one core.\n"
    return _STOP + why + " \\\n    ".join(parts) + " &\n" + _WAIT


def submit(text: str) -> str:
    """Hand a script to `sbatch`; the job's number, or `number;cluster`. UserError with what sbatch said, or if there is none."""
    done = subprocess.run([sbatch(), "--parsable"], input=text, text=True, capture_output=True, check=False)  # noqa: S603
    if done.returncode:
        raise UserError(f"`sbatch` refused the job: {done.stderr.strip()}", hint="print the script without --submit to see it")
    return done.stdout.strip()


def sbatch() -> str:
    """The path of `sbatch`. UserError if this machine has none."""
    path = shutil.which("sbatch")
    if path is None:
        raise UserError(
            "there is no `sbatch` on this machine", hint="run this on a login node of the cluster, or leave --submit out"
        )
    return path
