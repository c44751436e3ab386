"""The process group of a run: the program's own where it has one, else one that is made for the run and destroyed after it.

Several runs may follow one another in a program: each meets under names of its own in the store that torchrun or rank 0 keeps.
Knows nothing of models.
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
    """Be in a process group of `size` ranks on a `cpu` or `gpu` (`kind`); gives the run's own store of keys and values.

    A group that the program has made stays when this is left, and the groups made from it meanwhile go. Raises UserError where it
    cannot be used. All ranks enter this as often.
    """
    name = f"mbtrain-{next(_runs)}"
    if dist.is_initialized():
        _check(kind)
        with _further_groups():
            yield dist.PrefixStore(name, distributed_c10d._get_default_store())
        return
    timeout = timedelta(minutes=timeout_minutes)
    store, rank = (dist.HashStore(), 0) if size == 1 else _meeting_point(timeout)
    store = dist.PrefixStore(name, store)
    store.set_timeout(timeout)
    backend = "gloo" if kind == "cpu" else "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield store
    finally:
        dist.destroy_process_group()


_met: list[tuple[dist.Store, int]] = []


def _meeting_point(timeout: timedelta) -> tuple[dist.Store, int]:
    """The store that all ranks reach, and this one's number. It is kept: on rank 0 it may be the server itself."""
    if not _met:
        store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
        _met.append((store, rank))
    return _met[0]


def _check(kind: str) -> None:
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
def _further_groups() -> Iterator[None]:
    """Destroy the groups that are made while this is entered."""
    groups = distributed_c10d._world.pg_map
    before = set(groups)
    try:
        yield
    finally:
        for group in [one for one in groups if one not in before]:
            dist.destroy_process_group(group)
