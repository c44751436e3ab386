"""`mbtrain plot`."""

from __future__ import annotations

from pathlib import Path

import click

from trainer.arguments import HomePath


@click.command(name="plot", epilog="Example: mbtrain plot run")
@click.argument("run_dirs", nargs=-1, required=True, metavar="RUN_DIR…", type=HomePath())
@click.option("--out", type=HomePath(), help="The PNG to write; without it, `curves.png` in the first RUN_DIR.")
def command(run_dirs: tuple[Path, ...], out: Path | None) -> None:
    """Plot the curves of one run or several.

    Loss, learning rate, gradient norm and throughput, as a PNG.
    """
    from trainer.logging.plot import plot  # noqa: PLC0415 - `--help` needs no matplotlib

    out = out or run_dirs[0] / "curves.png"
    plot(run_dirs, out)
    click.echo(out)
