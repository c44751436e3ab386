"""`mbtrain launch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from trainer.launch import STOP_BEFORE, Job, pretrain_program, resumable

if TYPE_CHECKING:
    from trainer.config import RunConfig


@click.command(
    name="launch",
    epilog="Example: mbtrain launch --slurm llama3_8b --nodes 2 checkpoint.save=run",
    context_settings={"ignore_unknown_options": False},
)
@click.option("--slurm", "by_slurm", is_flag=True, help="As an sbatch script.")
@click.option("--nemo-run", "by_nemo_run", is_flag=True, help="As a NeMo-Run experiment.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines.")
@click.option(
    "--gpus-per-node", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs, and processes, per machine."
)
@click.option("--time", default="04:00:00", show_default=True, metavar="HH:MM:SS", help="Slurm's time limit.")
@click.option("--stop-before", type=click.IntRange(min=31), default=STOP_BEFORE, show_default=True, metavar="SECONDS",
              help="How long before the time limit the run is signalled to save and stop.")  # fmt: skip
@click.option("--partition", help="Slurm's partition.")
@click.option("--account", help="Slurm's account.")
@click.option("--container", metavar="IMAGE", help="An image for Slurm's pyxis, or for NeMo-Run.")
@click.option("--mounts", metavar="PATHS", help="What the container sees of the disks: /data:/data,/home/me.")
@click.option("--job-name", help="The job's name; without it, the recipe's.")
@click.option("--env", "env", multiple=True, metavar="NAME=VALUE", help="An environment variable of the run; may be repeated.")
@click.option("--form", type=click.Choice(["script", "partial"]), default="script", show_default=True,
              help="NeMo-Run: the command line as run.Script, or the recipe as run.Partial.")  # fmt: skip
@click.option("--executor", "where", type=click.Choice(["local", "slurm"]), default="local", show_default=True,
              help="NeMo-Run: on this machine, or by Slurm.")  # fmt: skip
@click.option("--submit/--dry-run", default=False, help="Run it; without it, only show what would be run.")
def command(*, by_slurm: bool, by_nemo_run: bool, recipe: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Run a recipe under Slurm or NeMo-Run.

    Prints an sbatch script or a NeMo-Run experiment, or submits it.

    KEY=VALUE settings are those of `mbtrain pretrain`; a run that cannot start there is refused here.

    Before the time is up an sbatch script has the run save to `checkpoint.save`, and puts the job back into the queue; it goes on
    from there.
    """
    if by_slurm == by_nemo_run:
        raise click.UsageError("say how: --slurm or --nemo-run")
    form, where, submit = options.pop("form"), options.pop("where"), options.pop("submit")
    config = _check(recipe, overrides, ranks=options["nodes"] * options["gpus_per_node"])
    if by_slurm or where == "slurm":
        overrides = resumable(config.checkpoint, overrides)
    name = options.pop("job_name") or recipe
    env = dict(_pair(text) for text in options.pop("env"))
    job = Job(program=pretrain_program(recipe, overrides), name=name, env=env, **options)
    if by_slurm:
        _slurm(job, submit=submit)
    else:
        _nemo_run(job, recipe, overrides, form=form, where=where, submit=submit)


def _check(recipe: str, overrides: tuple[str, ...], *, ranks: int) -> RunConfig:
    """Return the unresolved run. Raises UserError for settings that would stop the job once it has waited for its machines."""
    from trainer.arguments import read_run  # noqa: PLC0415
    from trainer.checkpoints import resume_point  # noqa: PLC0415 - seconds to import
    from trainer.config import FinetuningDatasetConfig  # noqa: PLC0415
    from trainer.data.chat.splits import check_sources  # noqa: PLC0415
    from trainer.settings.resolve import resolve  # noqa: PLC0415

    config = read_run(recipe, overrides=overrides)
    resume_point.find(resolve(config, world_size=ranks, device="gpu").config.checkpoint)
    if isinstance(config.dataset, FinetuningDatasetConfig):
        check_sources(config.dataset)
    return config


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"`{text}` has no `=`; write NAME=VALUE", param_hint="--env")
    return name, value


def _slurm(job: Job, *, submit: bool) -> None:
    from trainer.launch import slurm  # noqa: PLC0415 - one of two

    text = slurm.script(job)
    click.echo(slurm.submit(text) if submit else text, nl=submit)


def _nemo_run(job: Job, recipe: str, overrides: tuple[str, ...], *, form: str, where: Any, submit: bool) -> None:
    from trainer.launch import nemo  # noqa: PLC0415 - one of two

    task = nemo.script(job, where=where) if form == "script" else nemo.partial(run_recipe, recipe, list(overrides))
    if not nemo.launch(task, nemo.executor(job, where=where), name=job.name, submit=submit):
        raise SystemExit(1)


def run_recipe(recipe: str, overrides: list[str]) -> None:
    """Train `recipe` with `key=value` settings: the function that NeMo-Run stores by its name, with plain arguments."""
    from trainer.arguments import read_run  # noqa: PLC0415 - NeMo-Run imports this module where the job is made
    from trainer.loop import pretrain  # noqa: PLC0415

    pretrain(read_run(recipe, config_file=None, overrides=overrides))
