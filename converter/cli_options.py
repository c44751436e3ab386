"""The options that several commands of `mbconvert` share, as decorators."""

from __future__ import annotations

from collections.abc import Callable

import click

from converter.workers import MOST_WORKERS
from formats.dtypes import MODEL_DTYPES

WORKERS = click.IntRange(1, MOST_WORKERS)
_DTYPES = click.Choice(["keep", *MODEL_DTYPES])

Command = Callable[..., None]


INTEGRITY = click.option("--integrity/--no-integrity", default=True, show_default=True,
                         help="Write hashes: the BLAKE3 of every tensor and, for a Megatron checkpoint, the sha256 of every file "
                         "in the form that megatron-core checks.")  # fmt: skip


def conversion(command: Command) -> Command:
    """Add the options that every conversion of weights has."""
    dtype = click.option("--dtype", type=_DTYPES, default="keep", show_default=True, help="Cast weights.")
    return dtype(INTEGRITY(execution(command)))


def execution(command: Command) -> Command:
    """Add the options of every command that writes an output."""
    options = [
        click.option(
            "--workers",
            type=WORKERS,
            metavar="N",
            help="Number of threads; it does not change the output. [default: the number of cores, 2 to 4]",
        ),
        click.option("--dry-run", is_flag=True, help="Print the files to be written, peak memory and free disk; write nothing."),
        click.option("--overwrite", is_flag=True, help="Replace DST after the new output is complete."),
        click.option(
            "--verify", is_flag=True, help="Read the output back from disk and compare it with the source before DST appears."
        ),
        click.option("--resume", is_flag=True, help="Continue an interrupted run, if there is one."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object."),
        click.option("-q", "--quiet", is_flag=True, help="Print no progress and no notes."),
    ]
    for option in reversed(options):
        command = option(command)
    return command
