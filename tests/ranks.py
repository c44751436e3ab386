"""Processes that stand for GPUs, each forked for one run from a process that has imported torch and megatron-core.

A rank ends with its run, and with it the threads that gloo keeps for each process group, the memory of the run, and what it
changed in modules. A fork costs a hundredth of an import.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

LONGEST = 900.0
"""Seconds that a run may take before its test fails: minutes, for a busy machine."""

AFTERWARDS = 10.0
"""Seconds that the other ranks get to fail by themselves after one has failed, before they are killed."""


GPUS = any(Path("/dev").glob("nvidia[0-9]*"))
"""Are there any? Then each rank starts afresh: importing Transformer Engine starts CUDA, which a forked process cannot use."""


def warm() -> BaseContext:
    """Start the process that ranks are forked from, if it does not run yet. Returns the context that starts ranks."""
    if GPUS:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    forkserver.ensure_running()
    return context


def check_warm() -> None:
    """In a process that was started: fail if it was forked from one that could not import `tests.warm`."""
    assert GPUS or "tests.warm" in sys.modules, "forked from a process that has imported nothing"


class Meeting:
    """Where the ranks of one run find one another, as torchrun arranges it: a store that is not one of them.

    Its port is chosen by the kernel and is in use from then on, so that no other run can take it.
    """

    def __init__(self) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def environment(self, rank: int, world: int) -> dict[str, str]:
        """What torchrun sets for a rank."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }


class WriteResults:
    """Queues for what the writers of a checkpoint report to their rank, of the kind that megatron-core makes.

    megatron-core would start a Python for its own, which imports torch, in every rank that saves.
    """

    def __init__(self) -> None:
        self._manager = warm().Manager()

    def queue(self) -> Any:
        """One for a rank."""
        return self._manager.Queue()

    def close(self) -> None:
        """End the process that holds the queues."""
        self._manager.shutdown()


def use_write_results(queue: Any) -> None:
    """In a rank: have megatron-core use this queue."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue


class Ranks:
    """`run(f, world, …)` calls `f(…)` once on each of `world` ranks and returns what each answered."""

    def __init__(self) -> None:
        self._context, self.write_results = warm(), WriteResults()

    def run(self, function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
        """The answers by rank. Raises what the first rank to fail has raised."""
        call, meeting = pickle.dumps((function, args)), Meeting()
        with tempfile.TemporaryDirectory() as folder:
            ranks = [self._start(call, meeting.environment(number, world), Path(folder)) for number in range(world)]
            try:
                return _answers(ranks)
            finally:
                for rank in ranks:
                    rank.end()

    def _start(self, call: bytes, environment: dict[str, str], folder: Path) -> _Rank:
        return _Rank(self._context, call, self.write_results.queue(), environment, folder)


class _Rank:
    """A process of one run, and the pipe that brings its answer."""

    def __init__(self, context: BaseContext, call: bytes, queue: Any, environment: dict[str, str], folder: Path) -> None:
        self.number, self._queue = environment["RANK"], queue  # which lives as long as somebody here holds it
        self._log = folder / self.number
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, call, queue, environment, str(self._log)))
        self.process.start()
        theirs.close()

    def answer(self) -> tuple[bool, Any]:
        """Whether it did what it was asked to, and its answer or exception. It lives until `end`."""
        try:
            done, answer, text = pickle.loads(self.pipe.recv_bytes())
        except EOFError:
            self.process.join()
            log = self._log.read_text() if self._log.exists() else ""
            return False, RuntimeError(f"rank {self.number} ended with `{self.process.exitcode}` and no answer:\n{log}")
        if not done:
            answer.__cause__ = RuntimeError(f"on rank {self.number}:\n{text}\n{self._log.read_text()}")
        return done, answer

    def kill(self) -> None:
        """Kill it and what it has started."""
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Let it go, and wait until it is gone."""
        self.pipe.close()
        self.process.join(LONGEST)
        self.process.close()


def _answers(ranks: list[_Rank]) -> list[Any]:
    """What they answered. Nobody goes before all have answered: gloo takes that for a failure on those who still send."""
    waiting, answers, failed = dict.fromkeys(ranks), {}, []
    until = time.monotonic() + LONGEST
    while waiting and (ready := wait([rank.pipe for rank in waiting], max(0.0, until - time.monotonic()))):
        for rank in [rank for rank in waiting if rank.pipe in ready]:
            del waiting[rank]
            done, answers[rank] = rank.answer()
            if not done:
                failed.append(answers[rank])
                rank.pipe.close()  # it ends, and the others hear of it
                until = min(until, time.monotonic() + AFTERWARDS)
    for rank in waiting:
        rank.kill()
    if failed:
        raise _cause(failed)
    assert not waiting, f"ranks {', '.join(rank.number for rank in waiting)} of {len(ranks)} still ran after {LONGEST} s"
    return [answers[rank] for rank in ranks]


def _cause(failed: list[BaseException]) -> BaseException:
    """What went wrong: not what torch says on ranks that have lost their partner, if another rank says something else."""
    return next((error for error in failed if not isinstance(error, RuntimeError)), failed[0])


def _serve(pipe: Connection, call: bytes, queue: Any, environment: dict[str, str], log: str) -> None:
    os.setsid()
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.environ.update(environment)
    try:
        check_warm()
        use_write_results(queue)
        function, args = pickle.loads(call)
        answer = pickle.dumps((True, function(*args), ""))
    except BaseException as error:
        answer = _failure(error)
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(EOFError, ConnectionError):
        pipe.send_bytes(answer)
        pipe.recv_bytes()  # nothing comes: it is closed when this rank may end


def _failure(error: BaseException) -> bytes:
    text = traceback.format_exc()
    try:
        return pickle.dumps((False, error, text))
    except Exception:  # an exception may hold what cannot be pickled
        return pickle.dumps((False, RuntimeError(str(error)), text))
