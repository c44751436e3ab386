"""How fast are `average` and `extend-vocab` beside `cp` of their inputs? Prints ratios measured in turns, in one run.

    python benchmarks/editing.py [--runs 3] [--shape 1b] [--folder DIR]

Two Llamas, as Hugging Face directories and as Megatron checkpoints at TP8·PP4. Each round runs `cp -r` of what a command reads
and `sync`, then the command and `sync`: both directories for an average, which writes half as much. `bare` hashes nothing
(`--no-integrity`). Columns are those of benchmarks/convert.py; the load of the machine is said before and after each shape. Needs
no torch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from benchmarks.convert import HEADER, SHAPES, Run, line, machine, make_model, row, timed

TP, PP = 8, 4
MORE_TOKENS = 256


def make_sources(folder: Path, shape: dict) -> tuple[dict[str, Path], dict[str, Path]]:
    """Two models and their conversions, by what they are read as: one of both kinds, and the other."""
    for name in ("one", "other"):
        make_model(folder / name, shape)
        layout = ["--tp", str(TP), "--pp", str(PP), "--quiet"]
        command = [sys.executable, "-m", "converter", "hf-to-mcore", str(folder / name), str(folder / f"{name}-mcore"), *layout]
        timed(command, folder / f"{name}-mcore")
    return (
        {"hf": folder / "one", "mcore": folder / "one-mcore"},
        {"hf": folder / "other", "mcore": folder / "other-mcore"},
    )


def commands(first: dict[str, Path], second: dict[str, Path], out: Path, tokens: int) -> dict[str, tuple[list[Path], list[str]]]:
    """What each command reads, and the command, by its name in the table."""
    by_direction = {}
    for kind in ("hf", "mcore"):
        for name, flags in ((kind, []), (f"{kind}-bare", ["--no-integrity"])):
            sources, options = [first[kind], second[kind]], ["--quiet", "--json", *flags]
            average = ["average", *map(str, sources), str(out), "--weights", "1,3", *options]
            extend = ["extend-vocab", str(first[kind]), str(out), "--to", str(tokens), *options]
            by_direction[f"avg-{name}"] = sources, average
            by_direction[f"vocab-{name}"] = sources[:1], extend
    return by_direction


def measure(folder: Path, name: str, runs: int) -> list[dict]:
    """One shape: `cp` of the inputs and each command in turns, `runs` times."""
    shape, out = SHAPES[name], folder / "X"
    pairs = commands(*make_sources(folder, shape), out, shape["vocab"] + MORE_TOKENS)
    rounds: dict[str, list[tuple[Run, Run]]] = {}
    for _ in range(runs):
        for direction, (inputs, words) in pairs.items():
            out.mkdir()
            copied = timed(["cp", "-r", *map(str, inputs), str(out)], out)
            rounds.setdefault(direction, []).append((timed([sys.executable, "-m", "converter", *words], out), copied))
    size = sum(path.stat().st_size for path in (folder / "one").iterdir())
    return [{**row(name, (TP, PP, direction), rows, size), "limit": None} for direction, rows in rounds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: 1b")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mbconvert-editing"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    print(machine(options.folder))
    for name in options.shape or ["1b"]:
        print(f"load {os.getloadavg()[0]:.1f}\n{HEADER}", flush=True)
        for figures in measure(options.folder, name, options.runs):
            print(line(figures), flush=True)
        print(f"load {os.getloadavg()[0]:.1f}")
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
