"""Real signals to a real process; ranks over gloo."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from trainer.signals import any_rank

# Prints a line when it is ready for a signal, and says what came of it.
PROGRAM = """
import os, signal, sys, time
from trainer.signals import Stop
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
with Stop() as stop:
    print("ready", flush=True)
    try:
        while not stop.requested:
            time.sleep(0.01)
        print("noted", stop.received.name, flush=True)
        sys.stdin.readline()
        print("finished", flush=True)
    except KeyboardInterrupt:
        print("at once", flush=True)
print(before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)], "torch" in sys.modules)
"""
# Asks four times: nobody was asked to stop, then rank 0, then rank 1, then nobody.
RANK = """
import sys, torch
from torch import distributed
from trainer.signals import any_rank
torch.set_num_threads(1)
rank = int(sys.argv[2])
distributed.init_process_group("gloo", init_method=sys.argv[1], rank=rank, world_size=2)
print([any_rank(rank == one, group=distributed.new_group(backend="gloo")) for one in (None, 0, 1, None)])
distributed.destroy_process_group()
"""


@pytest.fixture
def process():
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "ready\n"
        yield running
        running.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_noted_and_work_goes_on(process, number):
    process.send_signal(number)
    assert process.stdout.readline() == f"noted {number.name}\n"
    out, _ = process.communicate("\n", timeout=20)
    assert out == "finished\nTrue False\n"


def test_a_second_ctrl_c_stops_at_once(process):
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noted SIGINT\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.read() == "at once\nTrue False\n"


def test_a_second_sigterm_changes_nothing(process):
    # Slurm and torchrun may each send one.
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noted SIGTERM\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate("\n", timeout=20)
    assert out == "finished\nTrue False\n"


def test_one_process_asks_itself():
    assert any_rank(True) is True
    assert any_rank(False) is False


def test_every_rank_hears_of_the_one_that_was_asked(tmp_path):
    words = [sys.executable, "-c", RANK, f"file://{tmp_path}/store"]
    ranks = [subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    answers = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert answers == ["[False, True, True, False]\n"] * 2
