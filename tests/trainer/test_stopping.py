"""`mbtrain pretrain --nproc` under signals: it saves, ends with a code that tells, and the next start goes on exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trainer import witness
from trainer.checkpoints import iterations

SETTINGS = (
    "model.tensor_model_parallel_size=2",
    "model.num_layers=2",
    "train.train_iters=30",
    "train.micro_batch_size=1",
    "train.global_batch_size=2",
    "dataset.sequence_length=32",
    "validation.eval_iters=0",
    "checkpoint.save_interval=5",
    "checkpoint.async_save=true",
    "logger.log_interval=1",
)


class Launched:
    """`python -m trainer pretrain llama_tiny` on two processes."""

    def __init__(self, root: Path, *changes: str) -> None:
        words = [*SETTINGS, f"checkpoint.save={root}", f"checkpoint.load={root}", *changes]
        self.log = root.with_name(f"{root.name}.log")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer", "pretrain", "llama_tiny", "--nproc", "2", *words],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def until(self, condition) -> None:
        ends = time.monotonic() + 900
        while not condition():
            assert time.monotonic() < ends, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def ranks(self) -> list[int]:
        """Process ids of the ranks: the launcher's children."""
        return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def end(self) -> int:
        return self.process.wait(900)


def _told(root, step):
    path = root / "metrics.jsonl"
    return path.exists() and f'"iteration": {step},' in path.read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, ranks):
    root = tmp_path_factory.mktemp("stopping") / "whole"
    ranks.run(_pretrain, 2, [*SETTINGS, f"checkpoint.save={root}"])
    return witness.metrics(root)


def _pretrain(words):
    from trainer import arguments, loop

    loop.pretrain(arguments.read_run("llama_tiny", config_file=None, overrides=words))


@pytest.mark.slow
def test_sigterm_saves_then_exits_with_143_and_the_run_goes_on_exactly(tmp_path, ranks, uninterrupted):
    root = tmp_path / "run"
    launched = Launched(root)
    launched.until(lambda: _told(root, 6))  # a save is behind it: what writes, and what reads data, must live through this
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end() == 143, launched.log.read_text()
    stopped = iterations.latest(str(root))
    assert stopped.name > "iter_0000005"

    one_rank = Launched(root, "checkpoint.async_save=false")
    one_rank.until(lambda: _told(root, 15))
    os.kill(one_rank.ranks()[0], signal.SIGTERM)
    assert one_rank.end() == 143, one_rank.log.read_text()
    assert f"resumed {stopped}" in one_rank.log.read_text()
    assert iterations.latest(str(root)).name > "iter_0000014"

    ranks.run(_pretrain, 2, [*SETTINGS, f"checkpoint.save={root}", f"checkpoint.load={root}"])
    assert witness.metrics(root) == uninterrupted


@pytest.mark.slow
def test_ctrl_c_is_answered_then_saves_and_a_second_one_ends_without(tmp_path):
    saved = Launched(tmp_path / "saved")
    saved.until(lambda: _told(tmp_path / "saved", 2))
    saved.process.send_signal(signal.SIGINT)
    assert saved.end() == 130, saved.log.read_text()
    assert "SIGINT: stopping after this step; Ctrl-C again ends it now, and nothing is saved" in saved.log.read_text()
    assert iterations.latest(str(tmp_path / "saved"))

    # A step of 500 micro-batches: the second Ctrl-C comes long before the run could save.
    ended = Launched(tmp_path / "ended", "train.global_batch_size=500")
    ended.until(lambda: _told(tmp_path / "ended", 1))
    ended.process.send_signal(signal.SIGINT)
    ended.until(lambda: "SIGINT: stopping after this step" in ended.log.read_text())
    ended.process.send_signal(signal.SIGINT)
    assert ended.end() != 0, ended.log.read_text()
    assert iterations.latest(str(tmp_path / "ended")) is None
