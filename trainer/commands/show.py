"""`mbtrain show`: the whole run as it would be, without running it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from formats.errors import UserError
from trainer.settings.arguments import read_run, recipe_and_overrides, run_arguments

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.recipe import Recipe


@click.command("show", epilog="Example: mbtrain show llama31_70b --gpus 64")
@run_arguments
@click.option(
    "--gpus", "gpus", type=click.IntRange(min=1), metavar="N", help="As it would be on N GPUs; the recipe's number otherwise."
)
@click.option("--nproc", "processes", type=click.IntRange(min=1), metavar="N", help="As it would be with N processes on CPUs.")
def command(words: tuple[str, ...], *, config_file: str | None, gpus: int | None, processes: int | None) -> None:
    """Print the settings of a run and what it takes.

    Every setting as YAML, with parameters, memory, FLOPs and automatic choices.

    The YAML can be given to `--config`. Nothing is trained, and no GPU is needed.
    """
    if gpus and processes:
        raise UserError("`--gpus` and `--nproc` are both given", hint="give one of them")
    recipe, overrides = recipe_and_overrides(words)
    config = read_run(recipe, config_file=config_file, overrides=overrides)
    world_size, device = _machine(recipe, config, gpus=gpus, processes=processes)
    _show(config, world_size=world_size, device=device)


def _machine(recipe: str | None, config: RunConfig, *, gpus: int | None, processes: int | None) -> tuple[int, str]:
    """How many ranks, on what: as told, else what the recipe is for, else the fewest that hold one copy of the model."""
    from trainer import recipes  # noqa: PLC0415

    if gpus or processes:
        return gpus or processes or 1, "gpu" if gpus else "cpu"
    copy = math.prod(getattr(config.model, f"{one}_parallel_size", 1) for one in ("tensor_model", "pipeline_model", "context"))
    wanted = _recommended(recipes.find(recipe), config) if recipe else copy
    on_cpu = config.dist.device == "cpu" or wanted == 0
    size = copy if on_cpu else -(-wanted // copy) * copy
    return size, "cpu" if on_cpu else "gpu"


def _recommended(recipe: Recipe, config: RunConfig) -> int:
    from trainer.config import FinetuningDatasetConfig  # noqa: PLC0415

    if config.peft is not None:
        return recipe.peft_gpus
    return recipe.sft_gpus if isinstance(config.dataset, FinetuningDatasetConfig) else recipe.gpus


def _show(config: RunConfig, *, world_size: int, device: str) -> None:
    from trainer.settings import documents  # noqa: PLC0415
    from trainer.settings.resolve import resolve  # noqa: PLC0415
    from trainer.settings.values import plain  # noqa: PLC0415

    resolved = resolve(config, world_size=world_size, device=device)
    for line in _figures(resolved.config, world_size=world_size, device=device):
        click.echo(f"# {line}")
    for choice in resolved.explanations:
        click.echo(f"# {choice.setting} = {plain(choice.value)}: {choice.why}")
    for warning in resolved.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(documents.dump(resolved.config), nl=False)


def _figures(config: RunConfig, *, world_size: int, device: str) -> list[str]:
    from trainer.counting.estimate import memory, parameters  # noqa: PLC0415
    from trainer.counting.flops import flops_of_run  # noqa: PLC0415

    one, many = ("GPU", "GPUs") if device == "gpu" else ("process", "processes")
    units = one if world_size == 1 else many
    taken = memory(config, world_size=world_size)
    return [
        f"parameters: {parameters(config.model):,}",
        *_trained(config),
        f"memory of the fullest of {world_size} {units}, estimated: {taken.total / 1e9:.1f} GB",
        *(f"  {part.name}: {part.size / 1e9:.1f} GB, {part.why}" for part in taken.parts),
        f"FLOPs per token, forward and backward: {flops_of_run(config):.4g}",
    ]


def _trained(config: RunConfig) -> list[str]:
    from converter.console import count  # noqa: PLC0415
    from trainer.counting.adapters import known  # noqa: PLC0415
    from trainer.counting.estimate import adapters, parameters  # noqa: PLC0415

    if config.peft is None:
        return []
    if not known(config.peft):
        return [f"trained: what `{type(config.peft).__name__}` adds, which is not counted"]
    added = adapters(config.model, config.peft)
    return [f"trained: {count(added)} of {count(added + parameters(config.model))} parameters"]
