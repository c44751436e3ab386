"""Make a NeMo-Run experiment of a job, on this machine or through Slurm. Knows NeMo-Run's names, and what it does not quote."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from formats.errors import UserError
from formats.faults import fault
from trainer.launch import Job
from trainer.launch.slurm import sbatch

Where = Literal["local", "slurm"]


def script(job: Job, *, where: Where) -> Any:
    """Return the job's program as `run.Script`, for torchrun to start on every rank.

    An inline script, quoted here: NeMo-Run's local torchrun passes the `args` of a Script with shell quotes around them.
    """
    python = sys.executable if where == "local" else "python"
    return _nemo_run().Script(inline=f"exec {shlex.join([python, *job.program])}\n")


def partial(train: Callable[..., None], recipe: str, overrides: list[str]) -> Any:
    """Return `train` with its arguments `recipe` and `overrides`, as `run.Partial`. NeMo-Run stores the name of the function."""
    return _nemo_run().Partial(train, recipe=recipe, overrides=list(overrides))


def executor(job: Job, *, where: Where) -> Any:
    """Return the executor: torchrun with a process per GPU, here or by Slurm. Raises UserError without Slurm's account."""
    run = _nemo_run()
    if where == "local":
        # torchrun beside this interpreter, also where its environment is not activated.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return run.LocalExecutor(launcher="torchrun", ntasks_per_node=job.gpus_per_node, env_vars={"PATH": path, **job.env})
    if job.account is None:
        raise UserError("NeMo-Run's Slurm executor needs an account", hint="--account NAME")
    # NeMo-Run writes `export NAME=value` without quotes.
    env = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(job.stop_before - 30, 1)), **job.env}
    return run.SlurmExecutor(
        account=job.account,
        partition=job.partition,
        nodes=job.nodes,
        ntasks_per_node=job.gpus_per_node,
        gpus_per_node=job.gpus_per_node,
        time=job.time,
        signal=f"TERM@{job.stop_before}",
        exclusive=True,
        mem="0",
        container_image=job.container,
        container_mounts=job.mounts.split(",") if job.mounts else [],
        env_vars={name: shlex.quote(value) for name, value in env.items()},
        launcher="torchrun",
        srun_args=["--cpu-bind=none"],
        tunnel=run.LocalTunnel(job_dir=str(Path.cwd() / "nemo-run")),
        packager=run.Packager(),
    )


def launch(task: Any, executor: Any, *, name: str, submit: bool) -> bool:
    """Run the task, or only show what NeMo-Run would run. Returns whether all went well; a Slurm job is not waited for. Raises
    UserError without `sbatch`, where it is needed."""
    run = _nemo_run()
    detach = isinstance(executor, run.SlurmExecutor)
    if detach and submit:
        sbatch()
    with run.Experiment(name, executor=executor) as experiment:
        experiment.add(task, name=name, tail_logs=not detach)
        if not submit:
            experiment.dryrun()
            return True
        experiment.run(detach=detach, sequential=False)
        if detach:
            return True
    return all(str(job["status"]) == "SUCCEEDED" for job in experiment.status(return_dict=True).values())


def _nemo_run() -> Any:
    try:
        import nemo_run  # noqa: PLC0415 - optional, and slow
    except ModuleNotFoundError as error:
        if error.name == "nemo_run":
            raise UserError("NeMo-Run is not installed", hint="pip install 'mbtools[nemo-run]'") from error
        hint = f"pip install the package that has `{error.name}`"
        if str(error.name).startswith("leptonai"):
            # NeMo-Run 0.11 admits leptonai 0.47, which no longer has what it imports.
            hint = "pip install 'leptonai<0.47'"
        raise UserError(f"NeMo-Run is installed, but cannot be imported: {fault(error)}", hint=hint) from error
    return nemo_run
