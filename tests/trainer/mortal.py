"""Ranks that can be killed: forked from a process that has imported everything, so that a start costs little."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.ranks import Meeting, WriteResults, use_write_results, warm


class Mortal:
    """A run on `world` processes, each the leader of a session of its own, as under torchrun. Their words go to `log`."""

    def __init__(self, folder: Path, changes: dict[str, Any], *, world: int, log: Path) -> None:
        context, self._meeting, self._write_results = warm(), Meeting(), WriteResults()
        self._answers = [log.with_suffix(f".{rank}") for rank in range(world)]
        self._queues = [self._write_results.queue() for _ in range(world)]
        self.processes = [
            context.Process(
                target=_rank,
                args=(self._meeting.environment(rank, world), queue, (str(log), str(self._answers[rank])), str(folder), changes),
            )
            for rank, queue in enumerate(self._queues)
        ]
        self.log = log
        for process in self.processes:
            process.start()

    def kill(self, *ranks: int) -> None:
        """SIGKILL to these ranks, and all that they started; those left lose their partner and are waited for."""
        for rank in ranks:
            os.killpg(self.processes[rank].pid, signal.SIGKILL)
        for process in self.processes:
            process.join(900)
            assert not process.is_alive()

    def wait(self) -> list[Any]:
        """What each rank answered."""
        for process in self.processes:
            process.join(900)
            assert process.exitcode == 0, self.log.read_text()
        return [pickle.loads(path.read_bytes()) for path in self._answers]

    def until(self, condition: Any, *, longest: float = 900) -> None:
        """Wait for something to be so while all processes live."""
        ends = time.monotonic() + longest
        while not condition():
            assert time.monotonic() < ends, self.log.read_text()
            assert all(process.is_alive() for process in self.processes), self.log.read_text()
            time.sleep(0.001)


def _rank(environment: dict[str, str], queue: Any, files: tuple[str, str], folder: str, changes: dict[str, Any]) -> None:
    from tests.trainer import witness

    log, answer = files
    os.setsid()
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.environ.update(environment)
    use_write_results(queue)
    seen = witness.train(folder, changes)
    Path(answer).write_bytes(pickle.dumps(seen))
    sys.stderr.flush()
