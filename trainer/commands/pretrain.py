"""`mbtrain pretrain`."""

from __future__ import annotations

import os
import sys

import click


@click.command()
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1)
@click.option("--config", "config_file", type=click.Path(dir_okay=False), help="A YAML file of settings, laid over the recipe.")
@click.option("--nproc", type=click.IntRange(1), help="Start so many processes here; under torchrun or Slurm leave it out.")
def command(recipe: str | None, overrides: tuple[str, ...], config_file: str | None, nproc: int | None) -> None:
    """Train RECIPE with settings such as train.train_iters=100.

    Alone it trains in one process; `torchrun … -m trainer pretrain …` and `srun mbtrain pretrain …` in as many as they start.
    """
    from trainer import launching, loop
    from trainer.arguments import read_run

    if recipe is not None and "=" in recipe:
        recipe, overrides = None, (recipe, *overrides)
    config = read_run(recipe, config_file=config_file, overrides=overrides)
    if nproc is not None and nproc > 1 and "RANK" not in os.environ:
        launching.check(config, world_size=nproc)
        sys.exit(launching.launch(nproc, sys.argv[1:]))
    loop.pretrain(config)
