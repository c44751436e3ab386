"""Processes that torchrun or Slurm started, and the groups they form.

Of a model only the parallel sizes matter here. Slurm's variables are translated to torchrun's. `collectives` has the operations
over all ranks.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator, init_num_microbatches_calculator

from converter.ranks import from_environment
from formats.errors import UserError
from trainer import device, process_group, tensor_properties, user_buffers
from trainer.config import RunConfig


def world_size() -> int:
    """Return the number of processes that torchrun, or else `srun`, started: 1 if none did. If the program has a process group
    already, return its size."""
    return dist.get_world_size() if dist.is_initialized() else from_environment().size


def adopt_slurm() -> None:
    """Set torchrun's variables if `srun` started several processes without torchrun."""
    if "RANK" not in os.environ and not dist.is_initialized() and world_size() > 1:
        os.environ.update(slurm_variables(os.environ))


def slurm_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for a task of an `srun` step. `MASTER_ADDR` and `MASTER_PORT` keep a value that they have.

    Raises UserError if the first host is not known.
    """
    ranks = from_environment(env)
    return {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.size),
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env),
        # Two steps of one job may share a node, and so may two jobs.
        "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + (_number(env, "JOB") + _number(env, "STEP")) % 10000),
    }


def _number(env: Mapping[str, str], kind: str) -> int:
    value = env.get(f"SLURM_{kind}_ID", "")
    return int(value) if value.isdecimal() else 0


def _first_host(env: Mapping[str, str]) -> str:
    """Return the host of rank 0. Slurm abbreviates several hosts as `node[01-04]`, which `scontrol` expands."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    if nodes and not set(nodes) & set("[,"):
        return nodes
    scontrol = shutil.which("scontrol", path=env.get("PATH"))
    if scontrol and nodes:
        command = [scontrol, "show", "hostnames", nodes]
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if result.returncode == 0 and result.stdout.strip():
            return result.stdout.split()[0]
    raise UserError(
        f"cannot find the first host of Slurm's `{nodes}`: `scontrol show hostnames` "
        f"{'failed' if scontrol else 'is not installed here'}",
        hint="set `MASTER_ADDR` to that host before `srun`, or start with torchrun",
    )


_WAYS_OUT = "start all processes with torchrun, or unset `RANK` and `WORLD_SIZE` to train in this one alone"


def check_rendezvous(env: Mapping[str, str]) -> None:
    """Raise UserError if there are several processes, and the environment has no address at which they connect."""
    size = from_environment(env).size
    if size == 1:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        raise UserError(
            f"`WORLD_SIZE` is `{size}`, and {' and '.join(f'`{name}`' for name in missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: the processes cannot connect",
            hint=f"{_WAYS_OUT}; or set both to rank 0's host and a free port of it",
        )
    port = env["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"`MASTER_PORT` is `{port}`, which is not a port", hint=f"set it to a number up to {2**16 - 1}; or {_WAYS_OUT}"
        )


def starts_others(nproc: int | None) -> bool:
    """Return whether this process is to start the `nproc` processes of a run, since it is not one of them.

    Raises UserError if processes were started already, and not `nproc`.
    """
    size = world_size()
    if nproc is None or nproc == 1 or size == 1:
        return nproc is not None and nproc > 1
    if nproc != size:
        raise UserError(
            f"`--nproc` is `{nproc}`, and this is one of `{size}` processes that were started already",
            hint="leave `--nproc` out; or unset `RANK` and `WORLD_SIZE` if they are left over from another program",
        )
    return False


@contextmanager
def session(config: RunConfig, kind: str) -> Iterator[None]:
    """Set up process groups, seeds and the microbatch calculator of a run while this is entered. All ranks enter it."""
    device.set_environment(config)
    if not dist.is_initialized():
        check_rendezvous(os.environ)
    device.prepare(kind)
    joined = process_group.joined(kind, size=world_size(), timeout_minutes=config.dist.timeout_minutes)
    with device.backend(kind), device.layers_restored(), device.determinism(config.model), joined as store:
        try:
            _start(config)
            with user_buffers.initialized(config), tensor_properties.without_strides():
                yield
        except UserError as error:
            error.told = not _is_first_to_print(store, error)  # type: ignore[attr-defined]
            raise
        finally:
            destroy_num_microbatches_calculator()
            parallel_state.destroy_model_parallel()


def _is_first_to_print(store: dist.Store, error: UserError) -> bool:
    """Return whether this rank prints an error that several ranks have: the first one does, and any that finds rank 0 gone."""
    try:
        return store.add(f"told {error}", 1) == 1
    except dist.DistNetworkError:
        return True


def _start(config: RunConfig) -> None:
    form_groups(config.model, timeout_minutes=config.dist.timeout_minutes)
    seed(config.rng.seed)
    init_num_microbatches_calculator(
        rank=dist.get_rank(),
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )


def form_groups(model: Any, *, timeout_minutes: float, gloo: bool = True) -> None:
    """Make megatron-core's process groups for a model's parallel sizes; with `gloo`, a second set for the CPU."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=model.expert_tensor_parallel_size,
        distributed_timeout_minutes=max(1, int(timeout_minutes)),
        create_gloo_process_groups=gloo,
    )


def seed(number: int) -> None:
    """Seed all random number generators as Megatron-LM does: 100 apart per pipeline stage, and per tensor-parallel rank in
    megatron-core's tracker."""
    number += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    tensor_parallel.model_parallel_cuda_manual_seed(number)


def is_logging_rank() -> bool:
    """Return whether this rank logs: the last, where the last pipeline stage computes the loss."""
    return dist.get_rank() == dist.get_world_size() - 1
