"""Start several processes on this machine through torch's elastic launcher, as `torchrun --standalone` does."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from uuid import uuid4

import click

from trainer import device, rehearsal
from trainer.checkpoints import resuming
from trainer.config import RunConfig
from trainer.data import iterators
from trainer.settings.resolve import resolve

STOPPING_S = "3600"
"""Seconds that processes may take to save after SIGTERM."""


def check(config: RunConfig, *, world_size: int) -> None:
    """Raise UserError for whatever would stop the run before its first step, before processes start."""
    kind = device.choose(config.dist.device)
    resolved = resolve(config, world_size=world_size, device=kind)
    if kind == device.CPU:
        rehearsal.rehearse(resolved.config, world_size=world_size)
    iterators.check(config)
    resuming.find(resolved.config.checkpoint)


@contextmanager
def _ctrl_c_for_processes() -> Iterator[None]:
    """Pass each Ctrl-C on to the processes, which know a first one from a second: torch's launcher would pass on one alone."""

    import psutil  # noqa: PLC0415 - needed here alone

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for child in psutil.Process().children():
            if os.getsid(child.pid) == child.pid:  # each process of a run leads a session of its own
                child.send_signal(number)

    before = signal.signal(signal.SIGINT, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `mbtrain` with these arguments in `count` processes. Returns the exit status, as a shell reports it.

    That of the first process that failed; 143 where SIGTERM stopped the run, 130 for Ctrl-C.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415 - a second to import
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", STOPPING_S)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",
    )
    try:
        with _ctrl_c_for_processes():
            elastic_launch(config, sys.executable)("-m", "trainer", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code: int = failure.exitcode
        if code < 0:
            click.echo(f"error: rank {rank} was killed by {signal.Signals(-code).name}; the others were ended", err=True)
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0
