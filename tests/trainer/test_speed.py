"""Speeds in the log are those of steps: neither of the start, nor of steps before a resume. By a clock that the test turns."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from trainer.logging import logger
from trainer.logging.metrics import Interval, Measure
from trainer.state import Step

TOKENS = 1000


class Clock:
    """Seconds, as `time.perf_counter` answers them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(time, "perf_counter", fake)
    return fake


def told(clock, seconds, *, every, resumed_at=0, carried=None, start=0.0):
    """The records of the lines of a run whose steps take `seconds` each, after a start of `start` seconds."""
    records = []
    measure = Measure(flops_per_token=1e9, tokens_per_step=TOKENS, num_gpus=1, train_iters=60, device="cpu")
    writers = SimpleNamespace(log_interval=records.append, log_step=lambda _: None)
    run_logger = logger.RunLogger(measure, writers, log_interval=every, sequence_length=32)
    if carried:
        run_logger.interval = Interval.from_state_dict(carried)
    clock.now += start
    run_logger.clock.restart()
    for number, took in enumerate(seconds, resumed_at + 1):
        clock.now += took
        step = Step(loss=1.0, grad_norm=1.0, lr=1e-3, applied=True, loss_scale=None, stop=False, save=False, memory_gib=1.0)
        run_logger.step(SimpleNamespace(iteration=number, consumed_samples=number), step)
    return records, run_logger.interval.state_dict()


def test_a_resume_between_two_lines_does_not_credit_steps_before_it(clock):
    _, carried = told(clock, [1.0] * 39, every=20)
    assert carried["steps"] == 19
    records, _ = told(clock, [2.0] * 21, every=20, resumed_at=39, carried=carried)
    assert [(record.iteration, record.seconds_per_step, record.tokens_per_second_per_gpu) for record in records] == [
        (40, 2.0, TOKENS / 2),
        (60, 2.0, TOKENS / 2),
    ]


def test_neither_the_start_nor_the_first_step_counts_in_the_first_rate(clock):
    records, _ = told(clock, [7.0, 1.0, 1.0, 1.0, 1.0, 1.0], every=3, start=100.0)
    assert [record.seconds_per_step for record in records] == [1.0, 1.0]
    assert records[0].time_left_s == 57.0


def test_a_line_that_has_the_first_step_alone_has_its_rate(clock):
    records, _ = told(clock, [7.0, 1.0], every=1, start=100.0)
    assert [record.seconds_per_step for record in records] == [7.0, 1.0]
