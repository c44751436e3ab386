"""The process group of a run: the program's own if it has one, else one that is made for the run and destroyed after it.

A program may have several runs, one after another: each has its own prefix in the store that torchrun or rank 0 serves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

from formats.errors import UserError

_BACKENDS = {"cpu": "cpu:gloo", "gpu": "cuda:nccl"}
_runs = itertools.count(1)


@contextmanager
def joined(kind: str, *, size: int, timeout_minutes: float) -> Iterator[dist.Store]:
    """Join a process group of `size` ranks on a `cpu` or `gpu` (`kind`), and yield the run's own key-value store.

    A group that the program has made is kept on leaving; groups that were made from it meanwhile are destroyed. Raises UserError
    if it cannot be used. All ranks enter this equally often.
    """
    name = f"mbtrain-{next(_runs)}"
    if dist.is_initialized():
        _check(kind)
        with _destroy_new_groups():
            yield dist.PrefixStore(name, distributed_c10d._get_default_store())
        return
    timeout = timedelta(minutes=timeout_minutes)
    store, rank = (dist.HashStore(), 0) if size == 1 else _rendezvous(timeout)
    store = dist.PrefixStore(name, store)
    store.set_timeout(timeout)
    backend = "gloo" if kind == "cpu" else "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield store
    finally:
        dist.destroy_process_group()


_connected: list[tuple[dist.Store, int]] = []


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int]:
    """Return the store that all ranks connect to, and this rank. It is kept: on rank 0 it may be the server itself."""
    if not _connected:
        store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
        _connected.append((store, rank))
    return _connected[0]


def _check(kind: str) -> None:
    """Raise UserError if the program's process group cannot be used for a run."""
    has, needs = dist.get_backend_config(), _BACKENDS[kind]
    if needs not in has:
        raise UserError(
            f"this program's process group has the backends `{has}`, and a run on a {kind.upper()} needs `{needs}`",
            hint="call `init_process_group('cpu:gloo,cuda:nccl')`, or leave it to `pretrain`",
        )
    if parallel_state.model_parallel_is_initialized():
        raise UserError(
            "this program has formed megatron-core's model-parallel groups already",
            hint="call `parallel_state.destroy_model_parallel()` first: a run forms its own",
        )


@contextmanager
def _destroy_new_groups() -> Iterator[None]:
    """On leaving, destroy the groups that were made while this was entered."""
    groups = distributed_c10d._world.pg_map
    before = set(groups)
    try:
        yield
    finally:
        for group in [group for group in groups if group not in before]:
            dist.destroy_process_group(group)
