"""One conversion by 1, 2 and 4 processes: wall time, and how much of what the disk can do is used. Prints a table.

    python benchmarks/scale.py [--runs 3] [--shape 8b-16] [--folder DIR]

In each round the same bytes are first written by `dd` with direct I/O, in four streams at once, from a source in the page cache:
the disk's own limit, and every figure of the round is held against it. Start-up, rendezvous and `sync` are counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.convert import SHAPES, make_model

PROCESSES = (1, 2, 4)
BLOCK = 4 << 20
STREAMS = 4


def seconds(commands: list[list[str]], environments: list[dict[str, str]]) -> float:
    """Wall time of processes that run together, with `sync`."""
    os.sync()
    started = time.monotonic()
    running = [
        subprocess.Popen(command, env={**os.environ, **variables}, stderr=subprocess.DEVNULL)
        for command, variables in zip(commands, environments, strict=True)
    ]
    failed = [process.args for process in running if process.wait()]
    os.sync()
    if failed:
        sys.exit(f"error: {failed} failed")
    return time.monotonic() - started


def disk(source: Path, out: Path) -> float:
    """Seconds to write as much as the source's weights, in streams, past the page cache."""
    out.mkdir()
    blocks = [(path, size // BLOCK) for path in sorted(source.glob("*.safetensors")) if (size := path.stat().st_size)]
    commands = []
    for path, count in blocks:
        step = -(-count // STREAMS)
        for part in range(STREAMS):
            operands = [f"of={out / path.name}.{part}", f"skip={part * step}", f"count={step}"]
            commands.append(["dd", f"if={path}", f"bs={BLOCK}", "oflag=direct", *operands])
    wall = seconds(commands, [{}] * len(commands))
    shutil.rmtree(out)
    return wall


def convert(source: Path, out: Path, processes: int, options: list[str]) -> float:
    """Seconds for a conversion by so many processes."""
    command = [
        sys.executable,
        "-m",
        "converter",
        "hf-to-mcore",
        str(source),
        str(out),
        "--tp",
        "8",
        "--pp",
        "4",
        "--quiet",
        *options,
    ]
    port = str(20000 + os.getpid() % 10000)
    ranks = [{"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": port} for rank in range(processes)]
    wall = seconds([command] * processes, ranks if processes > 1 else [{}])
    shutil.rmtree(out)
    return wall


def measure(source: Path, runs: int, options: list[str]) -> dict[int, list[tuple[float, float]]]:
    """For each number of processes, the rounds' wall times, each with the disk's in the same round."""
    rounds: dict[int, list[tuple[float, float]]] = {count: [] for count in PROCESSES}
    for _ in range(runs):
        limit = disk(source, source.with_name("X"))
        for count in PROCESSES:
            rounds[count].append((convert(source, source.with_name("X"), count, options), limit))
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, default="8b-16")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mbconvert-scale"))
    options = parser.parse_args()
    source = options.folder / options.shape
    if not source.exists():
        make_model(source, SHAPES[options.shape])
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(f"{options.shape}, {size / 1e9:.2f} GB, TP8·PP4, {os.cpu_count()} cores")
    print(f"{'processes':>9} {'integrity':>9} {'wall':>8} {'GB/s':>6} {'disk':>8} {'of the disk':>11}  rounds")
    for name, flags in (("yes", []), ("no", ["--no-integrity"])):
        for count, rounds in measure(source, options.runs, flags).items():
            wall, limit = (statistics.median(column) for column in zip(*rounds, strict=True))
            share = statistics.median(disk / converted for converted, disk in rounds)
            shares = [round(disk / converted, 2) for converted, disk in rounds]
            print(
                f"{count:9} {name:>9} {wall:6.2f} s {size / wall / 1e9:6.2f} {limit:6.2f} s {share:11.0%}  {shares}", flush=True
            )
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
