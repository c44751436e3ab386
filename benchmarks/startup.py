"""How long commands of `mbtrain` take that train nothing, in core-seconds; `show` beside the import that it needs.

    python -m benchmarks.startup [--rounds 5] [--recipe llama3_70b]

Each round runs every command once, in turns, so that a machine whose speed drifts treats all alike. A row has the least of the
rounds, since whatever else goes on only adds to it, and wall seconds of that run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.convert import Run, timed

IMPORT = ["-W", "ignore", "-c", "import torch, megatron.core"]


@dataclass(frozen=True)
class Command:
    """A command, and how many core-seconds it may take, beyond the import of torch and megatron-core if it needs them."""

    name: str
    arguments: list[str]
    limit: float | None = None
    needs_import: bool = False


def commands(recipe: str) -> list[Command]:
    mbtrain = ["-m", "trainer"]
    return [
        Command("import torch, megatron.core", IMPORT),
        Command("mbtrain --help", [*mbtrain, "--help"], 0.3),
        Command("mbtrain recipes", [*mbtrain, "recipes"], 0.5),
        Command(f"mbtrain show {recipe}", [*mbtrain, "show", recipe], 1.5, needs_import=True),
    ]


def measure(asked: list[Command], rounds: int, run: Callable[[list[str], Path], Run] = timed) -> list[Run]:
    """Return the run of each command that took the fewest core-seconds. Raises CalledProcessError if a command fails."""
    runs = [[run([sys.executable, *one.arguments], Path()) for one in asked] for _ in range(rounds)]
    return [min(taken, key=lambda one: one.cores) for taken in zip(*runs, strict=True)]


def row(one: Command, run: Run, imported: Run) -> str:
    """A line of the table; with a limit, what counts against it and whether it is kept."""
    cells = [f"`{one.name}`", f"{run.cores:.2f}", f"{run.seconds:.2f}", "–", "–"]
    if one.limit is not None:
        counted = run.cores - (imported.cores if one.needs_import else 0.0)
        cells[3:] = [f"{counted:.2f}", f"{one.limit} {'kept' if counted <= one.limit else 'exceeded'}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", default="llama3_70b", help="what `show` shows")
    options = parser.parse_args()
    asked = commands(options.recipe)
    taken = measure(asked, options.rounds)
    print("| | core-seconds | wall | beyond the import | limit |\n|---|---|---|---|---|")
    for one, run in zip(asked, taken, strict=True):
        print(row(one, run, taken[0]), flush=True)


if __name__ == "__main__":
    main()
