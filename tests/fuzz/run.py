"""Damage real files and see that every reader reads right or refuses.

    python -m tests.fuzz.run [--inputs 200000] [--seed 1] [--reader NAME]

Each reader runs in its own process, so that one that crashes is a finding too. An input that takes a branch no input took
before is damaged further. Findings are put into `tests/fuzz/corpus`, one for each kind and place; exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from tests.fuzz import bases, guard
from tests.fuzz.coverage import Coverage
from tests.fuzz.mutate import mutate
from tests.fuzz.targets import TARGETS, Target

CORPUS = Path(__file__).parent / "corpus"
_KEPT = 300
_FEWEST = 20  # inputs, however short the time and busy the machine


@dataclass
class Tally:
    """What came of a reader's inputs."""

    reader: str
    inputs: int = 0
    right: int = 0
    refused: int = 0
    branches: int = 0
    memory: int = 0
    seconds: float = 0.0
    findings: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """What was said and the input, by kind and place of what happened: the first of each."""


class Sandbox:
    """Folders that hold the bases, one file of each damaged."""

    def __init__(self, folder: Path, target: Target) -> None:
        self._target, self._bases = target, target.bases()
        self._folders = [folder / f"base{number}" for number in range(len(self._bases))]
        for base, files in zip(self._folders, self._bases, strict=True):
            bases.write(base, files)

    def try_one(self, data: bytes, base: int, tally: Tally) -> None:
        """Read one input, and put down in the tally what came of it."""
        folder = self._folders[base]
        (folder / self._target.file).write_bytes(data)
        tally.inputs += 1
        try:
            result, refused, taken = guard.refusal(lambda: self._target.read(folder), folder)
            if refused is None:
                self._target.check(result, folder, self._bases[base])
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            tally.findings.setdefault(guard.where(error), (repr(str(error)[:150]), data))
            return
        tally.memory = max(tally.memory, taken)
        tally.right += refused is None
        tally.refused += refused is not None


def replay(target: Target, folder: Path, inputs: list[bytes]) -> Tally:
    """Inputs as they are, on every base."""
    tally, sandbox = Tally(target.name), Sandbox(folder, target)
    for base in range(len(target.bases())):
        for data in inputs:
            sandbox.try_one(data, base, tally)
    return tally


def fuzz(target: Target, folder: Path, *, inputs: int, seed: int, seconds: float = float("inf")) -> Tally:
    """Damaged inputs, so many or for so long; the same seed gives the same inputs."""
    sandbox = Sandbox(folder, target)
    rng, tally, started = Random(f"{seed} {target.name}"), Tally(target.name), time.monotonic()
    pool = [(number, base[target.file]) for number, base in enumerate(target.bases())]
    originals = len(pool)
    undamaged = Tally(target.name)
    for number, data in pool:
        sandbox.try_one(data, number, undamaged)
    assert undamaged.right == originals, f"{target.name}: the files are not read as they are: {undamaged}"
    with Coverage() as coverage:
        while tally.inputs < inputs and (tally.inputs < _FEWEST or time.monotonic() - started < seconds):
            base, data = rng.choice(pool[:originals]) if rng.random() < 0.4 else rng.choice(pool)
            damaged = mutate(data, target.kind, rng, [other for _, other in pool[:originals]])
            if damaged == data:
                continue
            sandbox.try_one(damaged, base, tally)
            if coverage.grew() and len(pool) < _KEPT:
                pool.append((base, damaged))
    tally.branches, tally.seconds = coverage.count, time.monotonic() - started
    return tally


def _child(target: Target, folder: Path, inputs: int, seed: int, answer: Connection) -> None:
    with guard.limited():
        tally = fuzz(target, folder, inputs=inputs, seed=seed)
    answer.send(tally)


def run_apart(target: Target, inputs: int, seed: int) -> Tally:
    """`fuzz` in a process of its own; one that dies leaves its last input."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as name:
        process = context.Process(target=_child, args=(target, Path(name), inputs, seed, theirs))
        process.start()
        theirs.close()
        try:
            tally = ours.recv()
        except EOFError:
            process.join()
            tally = Tally(target.name, inputs=1)
            tally.findings["the process died"] = str(process.exitcode), _last(Path(name), target.file)
        process.join()
    return tally


def _last(folder: Path, file: str) -> bytes:
    """What was put down last."""
    return max(folder.glob(f"*/{file}"), key=lambda path: path.stat().st_mtime_ns).read_bytes()


def save(tally: Tally) -> Iterator[str]:
    """Keep the findings; says of each where it is and what happened."""
    for what, (message, data) in tally.findings.items():
        path = CORPUS / tally.reader / hashlib.sha256(data).hexdigest()[:8]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        yield f"{tally.reader}/{path.name}: {what}: {message}"


def row(tally: Tally) -> str:
    other = tally.inputs - tally.right - tally.refused
    memory = f"{tally.memory / 2**20:.1f} MiB"
    return (
        f"{tally.reader:<15} {tally.inputs:>8} {tally.right:>11} {tally.refused:>9} {other:>6} {memory:>12} {tally.branches:>9}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reader", choices=[target.name for target in TARGETS])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    targets = [target for target in TARGETS if options.reader in (None, target.name)]
    tallies, findings, shares = [], [], sum(target.share for target in targets)
    print(f"seed {options.seed}")
    print(
        f"{'reader':<15} {'inputs':>8} {'read right':>11} {'refused':>9} {'other':>6} {'most memory':>12} {'branches':>9}",
        flush=True,
    )
    for target in targets:
        tallies.append(run_apart(target, -(-options.inputs * target.share // shares), options.seed))
        print(row(tallies[-1]), f" {tallies[-1].seconds:.0f} s" if sys.stderr.isatty() else "", flush=True)
        findings += save(tallies[-1])
    total = Tally("all", *(sum(getattr(tally, name) for tally in tallies) for name in ("inputs", "right", "refused", "branches")))
    total.memory = max(tally.memory for tally in tallies)
    print(row(total))
    print("\n".join(findings), file=sys.stderr)
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
