"""`mbtrain finetune`."""

from __future__ import annotations

import click

from trainer.arguments import num_processes, run_arguments
from trainer.commands.pretrain import run_training


@click.command(epilog="Example: mbtrain finetune llama3_8b checkpoint.pretrained_checkpoint=DIR dataset.path=chat.jsonl")
@run_arguments
@num_processes
@click.option("--skip-bad", is_flag=True, help="Count examples that cannot be used, as dataset.skip_bad=true does.")
def command(words: tuple[str, ...], config_file: str | None, nproc: int | None, *, skip_bad: bool) -> None:
    """Fine-tune a model on examples.

    RECIPE starts from checkpoint.pretrained_checkpoint=DIR and learns the examples of dataset.path=FILE.

    peft=lora, the default, and peft=dora train adapters; peft=none trains every parameter.

    Processes, signals and exit status as those of `mbtrain pretrain`.
    """
    run_training((*words, "dataset.skip_bad=true") if skip_bad else words, config_file, nproc, finetune=True)
