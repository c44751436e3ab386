"""Conversions in processes of their own, slow enough to be stopped at any step, and with a log of their steps."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks.convert import make_model

SHAPE = {"hidden": 128, "layers": 4, "heads": 8, "groups": 4, "head_dim": 16, "ffn": 256, "vocab": 1024, "tied": False}
PIECE_BYTES = 16 << 10
WORKERS = 3
LONGEST = 900
"""Seconds that anything may take before its test fails: minutes, for a busy machine."""

ROOT = Path(__file__).parents[1]

EXTRA = "model.layers.{}.self_attn.rotary_emb.inv_freq"
"""A tensor that no Megatron model has."""

CHILD = """
import itertools, json, os, pathlib, runpy, shutil, sys, time
import converter.execute, converter.run, converter.worker, formats.staging
from formats.huggingface import HuggingFaceWriter
from formats.fsdp_writer import FsdpWriter
from formats.outputs import LocalOutputs
from formats.rank_files_writer import RankFilesWriter
from formats.rendezvous import Rendezvous
from formats.torch_dist_writer import TorchDistWriter

log, release, pause, pauses, hold, piece_bytes, patience = json.loads(sys.argv[1])
log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
taken = itertools.count(1)

def held(name, number):
    return number >= hold.get(name, sys.maxsize) and not os.path.exists(release)

def slowly(owner, name, nbytes=lambda *_: 0):
    act, numbers = getattr(owner, name), itertools.count(1)
    def slow(*arguments, **options):
        number, of_all = next(numbers), next(taken)
        os.write(log, f"{name} {nbytes(*arguments)}\\n".encode())
        while held(name, number) or held("any", of_all):
            time.sleep(0.01)
        time.sleep(pauses.get(f"{name} {number}", pauses.get(name, pause)))
        return act(*arguments, **options)
    setattr(owner, name, slow)

converter.worker.PIECE_BYTES = piece_bytes
Rendezvous.__init__.__kwdefaults__["patience"] = patience
slowly(converter.run.PieceBuffers, "make")
for writer in (FsdpWriter, HuggingFaceWriter, RankFilesWriter, TorchDistWriter):
    slowly(writer, "write", lambda _writer, _outputs, _name, _region, data: data.nbytes)
slowly(converter.execute, "compare")
slowly(converter.execute, "check_room")
slowly(LocalOutputs, "put")
for name in ("_begin", "sync", "_publish", "_exchange", "_remove"):
    slowly(formats.staging, name)
slowly(shutil, "rmtree")
slowly(pathlib.Path, "rename")
sys.argv[1:2] = []
runpy.run_module("converter", run_name="__main__")
"""


def _heed_interrupts() -> None:
    """A shell has what it starts in the background ignore Ctrl-C, and so does all that is started from there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Conversion(subprocess.Popen[str]):
    """A conversion under way. It makes a pause before every step, or another one before those in `pauses`: all of a name, or
    `name 2`, the second.

    `hold` has numbers of steps by name (`any` counts all): each thread that comes to that one, or to a later one of the name,
    waits there for `release` or its end. `patience` is that of ranks with one another. Its log outlives it: those of several
    that are given one log are added up.
    """

    def __init__(
        self,
        *arguments: object,
        log: Path,
        pause=0.005,
        pauses=None,
        hold=None,
        piece_bytes=PIECE_BYTES,
        patience=60.0,
        env=None,
        **options,
    ) -> None:
        self._release = log.with_name(f"{log.name}.{secrets.token_hex(4)}.release")
        settings = json.dumps([str(log), str(self._release), pause, pauses or {}, hold or {}, piece_bytes, patience])
        command = [sys.executable, "-c", CHILD, settings, *map(str, arguments), "--workers", str(WORKERS), "--json"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options = {"preexec_fn": _heed_interrupts, **options}
        super().__init__(command, cwd=ROOT, env={**os.environ, **(env or {})}, **pipes, **options)
        self._log = log

    def until(self, step: str, times: int = 1) -> None:
        """Wait until it has taken a step so many times."""
        while steps(self._log)[step] < times:
            assert self.poll() is None, (step, self.stderr.read())
            time.sleep(0.002)

    def until_total(self, total: int) -> None:
        """Wait until it has taken so many steps of any name."""
        while sum(steps(self._log).values()) < total:
            assert self.poll() is None, (total, self.stderr.read())
            time.sleep(0.002)

    def until_it_ignores(self, number: int) -> None:
        """Wait until it ignores a signal."""
        ignored = re.compile(r"^SigIgn:\t(\w+)$", re.MULTILINE)
        while not int(ignored.search(Path(f"/proc/{self.pid}/status").read_text())[1], 16) >> number - 1 & 1:
            assert self.poll() is None, self.stderr.read()
            time.sleep(0.002)

    def release(self) -> None:
        """Let those who wait go on."""
        self._release.touch()

    def stop(self, number: int = signal.SIGKILL) -> tuple[int, str]:
        """Send a signal; its exit code and what it said."""
        self.send_signal(number)
        return self.end()

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said on stderr; what it said on stdout is in `summary`."""
        out, errors = self.communicate(timeout=LONGEST)
        self.summary = json.loads(out) if out else {}
        return self.returncode, errors


def kill_again_and_again(
    start: Callable[..., Conversion], *arguments: object, target: Path, log: Path, kills: int, nsteps: int, **options: object
) -> None:
    """Begin a conversion to `target` with `start`, and kill it, each time after another number of steps. Undisturbed it takes
    `nsteps` in all, so that it never ends."""
    at = random.Random(1)
    for _ in range(kills):
        taken, before = at.randrange(2, nsteps // kills), sum(steps(log).values())
        process = start(*arguments, log=log, pause=0, hold={"any": taken}, **options)
        process.until_total(before + taken)
        assert process.stop()[0] == -signal.SIGKILL
        assert not target.exists()
        assert set(journaled(target).values()) <= {1}, "a piece that was done was done again"


def steps(log: Path) -> Counter[str]:
    """How often each step was taken."""
    return Counter(line.split()[0] for line in _lines(log))


def written(log: Path) -> list[int]:
    """The bytes of every piece that was handed to a writer."""
    return [int(line.split()[1]) for line in _lines(log) if line.startswith("write ")]


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def journaled(target: Path) -> Counter[int]:
    """How often each piece stands in the journals of what was left at a target."""
    journals = target.parent.glob(f"{target.name}.partial-*.state/journal-*")
    return Counter(int(number) for path in journals for number in re.findall(r"^\[(\d+)\]$", path.read_text(), re.MULTILINE))


def partial(target: Path) -> Path:
    """The one directory that a run has left."""
    (folder,) = [path for path in target.parent.glob(f"{target.name}.partial-*") if path.suffix.startswith(".partial")]
    return folder


def make_source(folder: Path, **changes: object) -> Path:
    """A model in a few files, with some that travel."""
    make_model(folder, SHAPE | changes, shard_bytes=600_000)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(code): code for code in range(999)}}}))
    return folder


def with_extras(folder, *sizes):
    """A small Llama with one tensor of so many bytes for each layer, in a file of their own."""
    make_source(folder)
    tensors = {EXTRA.format(layer): np.arange(size // 4, dtype=np.float32) for layer, size in enumerate(sizes)}
    save_file(tensors, folder / "model-00009-of-00009.safetensors", {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "model-00009-of-00009.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
