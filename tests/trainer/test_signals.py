"""Real signals to a real process; ranks over gloo."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# Prints a line when it is ready for a signal, and says what came of it.
PROGRAM = """
import os, select, signal, sys, time
from trainer.signals import Stop
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
with Stop() as stop:
    print("ready", flush=True)
    try:
        while not stop.requested:
            time.sleep(0.01)
        print("noted", stop.received.name, flush=True)
        while not select.select([sys.stdin], [], [], 0.1)[0]:
            pass  # a signal just before a read that blocks would be handled only after it
        print("finished", flush=True)
    except KeyboardInterrupt:
        print("at once", flush=True)
print(before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)], "torch" in sys.modules)
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
    out, _ = process.communicate("\n", timeout=600)
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
    out, _ = process.communicate("\n", timeout=600)
    assert out == "finished\nTrue False\n"
