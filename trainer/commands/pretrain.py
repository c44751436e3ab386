"""`mbtrain pretrain`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from trainer.arguments import num_processes, read_run, recipe_and_overrides, run_arguments


@click.command(epilog="Example: mbtrain pretrain llama_tiny dataset.blend=[text] checkpoint.save=run train.train_iters=100")
@run_arguments
@num_processes
def command(words: tuple[str, ...], config_file: str | None, nproc: int | None) -> None:
    """Train a model from scratch or from a checkpoint.

    In one process, in --nproc of them, or in those that `torchrun … -m trainer pretrain …` starts.

    SIGTERM, SIGUSR1 or Ctrl-C, to this command or to any of its processes: the run saves and ends. Exit status: 0 done, or
    stopped where the settings say; 1 failed; 143 after SIGTERM, 138 after SIGUSR1, 130 after Ctrl-C.
    """
    run_training(words, config_file, nproc, finetune=False)


def run_training(words: Sequence[str], config_file: str | None, nproc: int | None, *, finetune: bool) -> None:
    """Train in this process, or start the processes that train. An error is reported to torchrun, if it started this process."""
    act = _run_here_or_launch
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import record  # noqa: PLC0415 - seconds to import

        act = record(act)
    act(words, config_file, nproc, finetune=finetune)


def _run_here_or_launch(words: Sequence[str], config_file: str | None, nproc: int | None, *, finetune: bool) -> None:
    from trainer import device, launching, loop, parallel  # noqa: PLC0415 - seconds to import

    recipe, overrides = recipe_and_overrides(words)
    config = read_run(recipe, config_file=config_file, overrides=overrides, finetune=finetune)
    if nproc is not None and parallel.starts_others(nproc):
        launching.check(config, world_size=nproc)
        sys.exit(launching.launch(nproc, sys.argv[1:]))
    if nproc is None and parallel.world_size() == 1 and (unused := device.unused(config.dist.device)):
        click.echo(f"note: {unused} of this machine's GPUs are not used; `--nproc gpu` starts a process for each", err=True)
    loop.pretrain(config)
