"""Processes that stand for GPUs: started once, each asked to be some rank of one run after another."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from typing import Any

WORLD = 4
LONGEST = 300
"""Seconds that a run may take before its test fails."""


class Ranks:
    """`run(f, world, …)` calls `f(…)` once on each of `world` ranks and answers what each said."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(WORLD, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare)

    def run(self, function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
        """The answers by rank; the first exception is raised here."""
        port = _free_port()
        asked = [self._pool.submit(_as_rank, function, rank, world, port, args) for rank in range(world)]
        done, waiting = wait(asked, timeout=LONGEST, return_when=FIRST_EXCEPTION)
        for one in done:
            one.result()
        assert not waiting, f"{len(waiting)} of {world} ranks still ran after {LONGEST} s"
        return [one.result() for one in asked]

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _prepare() -> None:
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def _as_rank(function: Callable[..., Any], rank: int, world: int, port: int, args: tuple[Any, ...]) -> Any:
    """Every rank of a run is in another process, because each waits for the others."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return function(*args)
