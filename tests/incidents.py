"""What a user sees when things go wrong: each incident brought about for real.

`python -m tests.incidents` prints the README's table.

Needs no torch.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.convert import SHAPES, make_model
from formats.shard_files import SINGLE

_SLOWLY = """
import itertools, runpy, sys, time
from converter.run import PieceBuffers

numbers = itertools.count()

def make(*arguments, make=PieceBuffers.make):
    time.sleep(3 if next(numbers) else 0)  # time for the signal, once there is a piece
    return make(*arguments)

PieceBuffers.make = make
runpy.run_module("converter", run_name="__main__")
"""

THERE = ("hf-to-mcore", "Llama-3.2-1B", "megatron", "--tp", "2")


class Shell:
    """Commands in a folder with a small model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_model(folder / "Llama-3.2-1B", SHAPES["tiny"])

    def run(self, *words: str, limit: int | None = None) -> str:
        """What a command prints, and its exit code."""
        command = [sys.executable, "-m", "converter", *words]
        if limit:
            command = ["bash", "-c", f'ulimit -f {limit}; trap "" XFSZ; exec "$@"', "bash", *command]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        return f"{plain(done.stdout + done.stderr)}<br>exit {done.returncode}"

    def killed(self, number: signal.Signals) -> str:
        """What a slow conversion prints that gets a signal after its first piece, and its exit code."""
        process = subprocess.Popen(
            [sys.executable, "-c", _SLOWLY, *THERE], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while not any(
            re.search(rb"^\[\d+\]$", path.read_bytes(), re.MULTILINE) for path in self.folder.glob("*.state/journal-*")
        ):
            assert process.poll() is None, "it ended before its first piece was written down"
            time.sleep(0.01)
        process.send_signal(number)
        _, output = process.communicate()
        return f"{plain(output)}<br>exit {process.returncode}"


def plain(text: str) -> str:
    """Output as one cell, without what differs from run to run."""
    text = re.sub(r"partial-[0-9a-f]{12}", "partial-…", text)
    text = re.sub(r"\d+\.\d s \([^)]*\), peak memory [\d.]+ MB", "… s, peak memory … MB", text)
    text = re.sub(r"pid `\d+` on `[^`]+` since `[^`]+`, run `[^`]+`", "pid `…` on `…` since `…`, run `…`", text)
    text = re.sub(r"[\d.]+ GB free", "… GB free", text)
    text = re.sub(r"[\d.]+ MB reused", "… MB reused", text)
    return "<br>".join(line.strip() for line in text.splitlines() if line.strip())


class _Hostile:
    def __reduce__(self) -> object:
        return os.system, ("echo owned > owned",)


def incidents(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each incident and what the command prints, in an order in which each builds on the one before."""
    shell = Shell(folder)
    shell.killed(signal.SIGKILL)
    yield "a run was killed (`kill -9`, out of memory), and the command is given again", shell.run(*THERE)
    yield "… with `--resume`, but another option", shell.run(*THERE[:-1], "4", "--resume")
    yield "… with `--resume`", shell.run(*THERE, "--resume")
    shutil.rmtree(folder / "megatron")
    yield "SIGTERM, or Ctrl-C (then exit 130)", shell.killed(signal.SIGTERM)
    shell.run(*THERE, "--resume")
    shutil.rmtree(folder / "megatron")
    yield "a file-size limit is reached (a full disk: likewise)", shell.run(*THERE, limit=20_000)
    shell.run(*THERE, "--resume")
    yield "DST exists", shell.run(*THERE)
    yield "an option that does not fit the model", shell.run("hf-to-mcore", "Llama-3.2-1B", "m3", "--tp", "3")
    yield from _damaged(shell, folder)


def _damaged(shell: Shell, folder: Path) -> Iterator[tuple[str, str]]:
    chunk = folder / "megatron" / "iter_0000000" / "__1_0.distcp"
    data = bytearray(chunk.read_bytes())
    data[500_000] ^= 4
    chunk.write_bytes(data)
    yield "one bit of a checkpoint flipped: `inspect --check`", shell.run("inspect", "megatron", "--check")
    yield "… `verify`", shell.run("verify", "Llama-3.2-1B", "megatron")
    weights = folder / "Llama-3.2-1B" / SINGLE
    os.truncate(weights, weights.stat().st_size - 1000)
    yield "a shard is truncated", shell.run("hf-to-mcore", "Llama-3.2-1B", "m4")
    (folder / "megatron" / "iter_0000000" / ".metadata").write_bytes(pickle.dumps(_Hostile()))
    yield "a checkpoint contains code", shell.run("mcore-to-hf", "megatron", "hf")
    assert not (folder / "owned").exists(), "code ran"


def table(rows: Iterator[tuple[str, str]]) -> str:
    """The README's table."""
    lines = ["| what happens | what you see |", "|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {message.replace('|', '&#124;')} |" for what, message in rows)])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(table(incidents(Path(name))))
