"""Processes, and the groups they form: started by torchrun or Slurm, never by us.

Knows nothing of models but how many ways each is divided.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator, init_num_microbatches_calculator

from formats.errors import UserError
from trainer import device
from trainer.config import RunConfig


def world_size() -> int:
    """How many processes the engine that started this one has started: 1 if none did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def session(config: RunConfig, kind: str) -> Iterator[None]:
    """Process groups, seeds and the microbatch calculator of a run, for as long as this is entered."""
    device.prepare(kind)
    with device.stand_in(kind):
        _start(config, kind)
        try:
            yield
        except UserError as error:
            error.told = not _first_to_tell(error)  # type: ignore[attr-defined]
            raise
        finally:
            destroy_num_microbatches_calculator()
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _first_to_tell(error: UserError) -> bool:
    """Of several ranks with the same error, one tells it."""
    return dist.distributed_c10d._get_default_store().add(f"told {error}", 1) == 1


def _start(config: RunConfig, kind: str) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    alone = "RANK" not in os.environ
    dist.init_process_group(
        "gloo" if kind == device.CPU else "nccl",
        init_method="tcp://127.0.0.1:0" if alone else None,
        rank=0 if alone else -1,
        world_size=1 if alone else -1,
        timeout=timedelta(minutes=config.dist.timeout_minutes),
    )
    form_groups(config.model, timeout_minutes=config.dist.timeout_minutes)
    seed(config.rng.seed)
    init_num_microbatches_calculator(
        rank=dist.get_rank(),
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )


def form_groups(model: Any, *, timeout_minutes: float) -> None:
    """megatron-core's process groups for a model's parallel sizes."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=model.expert_tensor_parallel_size,
        distributed_timeout_minutes=max(1, int(timeout_minutes)),
    )


def seed(number: int) -> None:
    """Random numbers as Megatron-LM draws them: apart by 100 per pipeline stage; tensor-parallel ranks differ in megatron-core's
    tracker."""
    number += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    tensor_parallel.model_parallel_cuda_manual_seed(number)


def speaks() -> bool:
    """Is this the one rank that tells of the run? The last: it has the loss."""
    return dist.get_rank() == dist.get_world_size() - 1


def largest(numbers: list[float]) -> list[float]:
    """The largest of each number over all ranks: how they agree on what one of them saw."""
    told = torch.tensor(numbers, dtype=torch.float32, device=device.current())
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return told.tolist()


def on_first_rank(act: Callable[[], None]) -> None:
    """Do something on rank 0, while the others wait. What the disk says against it is an OSError on all of them."""
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            act()
        except OSError as error:
            told = [(error.errno, error.strerror, error.filename and str(error.filename))]
    dist.broadcast_object_list(told, src=0)
    if told[0]:
        raise OSError(*told[0])
