"""Processes, and the groups they form: started by torchrun or Slurm, never by us.

Knows nothing of models but how many ways each is divided. torchrun tells each process where the others are; what `srun` says
instead is put into the same words.
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
from trainer import device, process_group, user_buffers
from trainer.config import RunConfig


def world_size() -> int:
    """How many processes torchrun, or else `srun`, has started along with this one: 1 if none did. Of a program that has a
    process group already, those in it."""
    return dist.get_world_size() if dist.is_initialized() else from_environment().size


def adopt_slurm() -> None:
    """Where `srun` started several processes without torchrun, tell torch.distributed what torchrun would have told it."""
    if "RANK" not in os.environ and not dist.is_initialized() and world_size() > 1:
        os.environ.update(slurm_variables(os.environ))


def slurm_variables(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of an `srun` step. What `MASTER_ADDR` and `MASTER_PORT` are set to already is kept.

    UserError where the first host cannot be told.
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


def _number(env: Mapping[str, str], what: str) -> int:
    told = env.get(f"SLURM_{what}_ID", "")
    return int(told) if told.isdecimal() else 0


def _first_host(env: Mapping[str, str]) -> str:
    """Where rank 0 is. Slurm writes several hosts as `node[01-04]`, which `scontrol` takes apart."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    if nodes and not set(nodes) & set("[,"):
        return nodes
    scontrol = shutil.which("scontrol", path=env.get("PATH"))
    if scontrol and nodes:
        told = subprocess.run([scontrol, "show", "hostnames", nodes], capture_output=True, text=True, check=False)  # noqa: S603
        if told.returncode == 0 and told.stdout.strip():
            return told.stdout.split()[0]
    raise UserError(
        f"cannot tell which host is the first of Slurm's `{nodes}`: `scontrol show hostnames` "
        f"{'failed' if scontrol else 'is not here'}",
        hint="set `MASTER_ADDR` to that host before `srun`, or start with torchrun",
    )


_WAYS_OUT = "start all processes with torchrun, or unset `RANK` and `WORLD_SIZE` to train in this one alone"


def check_meeting_point(env: Mapping[str, str]) -> None:
    """UserError where there are several processes, and the environment does not say where they meet."""
    size = from_environment(env).size
    if size == 1:
        return
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if lacking:
        raise UserError(
            f"`WORLD_SIZE` is `{size}`, and {' and '.join(f'`{name}`' for name in lacking)} "
            f"{'is' if len(lacking) == 1 else 'are'} not set: processes do not know where to meet",
            hint=f"{_WAYS_OUT}; or set both to rank 0's host and a free port of it",
        )
    port = env["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"`MASTER_PORT` is `{port}`, which is not a port", hint=f"set it to a number up to {2**16 - 1}; or {_WAYS_OUT}"
        )


def starts_others(nproc: int | None) -> bool:
    """Is this the process that starts those of `--nproc`, and not one of them? UserError where others were started already, and
    are another number."""
    size = world_size()
    if nproc is None or nproc == 1 or size == 1:
        return nproc is not None and nproc > 1
    if nproc != size:
        raise UserError(
            f"`--nproc` is `{nproc}`, and this is one of `{size}` processes that were started already",
            hint="leave `--nproc` out; or unset `RANK` and `WORLD_SIZE` where they are left over from something else",
        )
    return False


@contextmanager
def session(config: RunConfig, kind: str) -> Iterator[None]:
    """Process groups, seeds and the microbatch calculator of a run, for as long as this is entered."""
    if not dist.is_initialized():
        check_meeting_point(os.environ)
    device.prepare(kind)
    joined = process_group.joined(kind, size=world_size(), timeout_minutes=config.dist.timeout_minutes)
    with device.backend(kind), device.environment_restored(), device.determinism(config), joined as store:
        try:
            _start(config)
            with user_buffers.initialized(config):
                yield
        except UserError as error:
            error.told = not _first_to_tell(store, error)  # type: ignore[attr-defined]
            raise
        finally:
            destroy_num_microbatches_calculator()
            parallel_state.destroy_model_parallel()


def _first_to_tell(store: dist.Store, error: UserError) -> bool:
    """Of several ranks with the same error, one tells it; so does one that comes after rank 0, and its store, have gone."""
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
    """megatron-core's process groups for a model's parallel sizes; without `gloo`, no second set of them."""
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
    """Random numbers as Megatron-LM draws them: apart by 100 per pipeline stage; tensor-parallel ranks differ in megatron-core's
    tracker."""
    number += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    tensor_parallel.model_parallel_cuda_manual_seed(number)


def is_logging_rank() -> bool:
    """True on the rank that logs: the last, where the last pipeline stage computes the loss."""
    return dist.get_rank() == dist.get_world_size() - 1
