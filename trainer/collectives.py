"""Collective operations over all ranks: agree on numbers, on what rank 0 found, and on the outcome of each step.

All ranks call each of these functions. They take and return plain values; what follows from them is the caller's to decide.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from formats.errors import UserError
from trainer import device


class StepReport(NamedTuple):
    """What one rank reports in a step. After `sync_step` each field is the largest over all ranks; 0 is "nothing to report"."""

    bad_rank: float = 0.0
    """1 + this rank, if its loss is NaN or Inf."""

    loss: float = float("-inf")
    """Mean loss per token; only the last pipeline stage computes it."""

    signal: float = 0.0
    """The number of the signal that this rank received."""

    stop: float = 0.0
    """1 if this rank was asked to stop, or its time is up."""

    save: float = 0.0
    """1 if this rank's clock says that a checkpoint is due."""

    waited: float = 0.0
    """Seconds that this rank waited for data."""

    tokens: float = 0.0
    """Of packed rows: tokens in examples, over the whole batch; only the last pipeline stage knows."""

    squares: float = 0.0
    """Of packed rows: the sum of the squares of the lengths of examples."""

    memory_gib: float = 0.0
    """The most memory that this rank has held."""


def sync_step(report: StepReport) -> StepReport:
    """Return the largest of each field over all ranks: the one all-reduce of each step besides megatron-core's own."""
    return StepReport(*largest(list(report)))


def largest(numbers: list[float]) -> list[float]:
    """Return the maximum of each number over all ranks, rounded to float32."""
    values = torch.tensor(numbers, dtype=torch.float32, device=device.current())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


def name_ranks(condition: bool) -> str:
    """Name the ranks on which `condition` holds, for a message: `rank 3 on `host`, like 2 more,`; empty if there are none."""
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, platform.node() if condition else None)
    first, *others = [f"rank {rank} on `{host}`" for rank, host in enumerate(hosts) if host is not None] or [""]
    return f"{first}, like {len(others)} more," if others else first


def from_first_rank[T](compute: Callable[[], T]) -> T:
    """Return on all ranks what `compute` returns on rank 0. Its UserError is raised on all of them too."""
    results: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            results[0] = compute()
        except UserError as error:
            results[1] = (error.args[0], error.hint)
    dist.broadcast_object_list(results, src=0)
    if results[1]:
        raise UserError(results[1][0], hint=results[1][1])
    return results[0]


def on_first_rank(act: Callable[[], None]) -> None:
    """Run `act` on rank 0 while the others wait. Its OSError is raised on all of them."""
    results: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            act()
        except OSError as error:
            results = [(error.errno, error.strerror, error.filename and str(error.filename))]
    dist.broadcast_object_list(results, src=0)
    if results[0]:
        raise OSError(*results[0])
