"""`mbtrain show`: print the settings of a run and what it takes, without running it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from formats.errors import UserError
from trainer.arguments import named_recipe, read_run, recipe_and_overrides, run_arguments
from trainer.formatting import number, size

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.estimate.memory import Estimate
    from trainer.recipe import Recipe


@click.command("show", epilog="Example: mbtrain show llama31_70b --gpus 64")
@run_arguments
@click.option(
    "--gpus",
    "gpus",
    type=click.IntRange(min=1),
    metavar="N",
    help="Show the run on N GPUs, instead of the recipe's number of them.",
)
@click.option("--nproc", "processes", type=click.IntRange(min=1), metavar="N", help="Show the run with N processes on CPUs.")
@click.option("--all", "every", is_flag=True, help="Print every setting, also those that nobody set, as this run would have it.")
def command(words: tuple[str, ...], *, config_file: str | None, gpus: int | None, processes: int | None, every: bool) -> None:
    """Print the settings of a run and what it takes.

    Prints what the recipe, the file and the command line say as YAML. Comments before it say the parameters, the memory and the
    FLOPs of the run, and every choice that is made for it.

    The YAML can be given to --config, where it leaves open what nobody chose. What --all prints leaves nothing open. Nothing is
    trained, and no GPU is needed.
    """
    if gpus and processes:
        raise UserError("`--gpus` and `--nproc` are both given", hint="give one of them")
    recipe, overrides = recipe_and_overrides(words)
    config = read_run(recipe, config_file=config_file, overrides=overrides)
    recipe = named_recipe(recipe, config_file)
    world_size, device = _ranks_and_device(recipe, config, gpus=gpus, processes=processes)
    _show(config, recipe=recipe, world_size=world_size, device=device, every=every)


def _ranks_and_device(recipe: str | None, config: RunConfig, *, gpus: int | None, processes: int | None) -> tuple[int, str]:
    """Return the number of ranks and the device: explicit, else the recipe's, else the fewest that hold one copy of the model."""
    from trainer import recipes  # noqa: PLC0415

    if gpus or processes:
        return gpus or processes or 1, "gpu" if gpus else "cpu"
    copy = math.prod(getattr(config.model, f"{axis}_parallel_size", 1) for axis in ("tensor_model", "pipeline_model", "context"))
    gpus_of_recipe = _recommended(recipes.find(recipe), config.dataset, adapted=config.peft is not None) if recipe else copy
    on_cpu = config.dist.device == "cpu" or gpus_of_recipe == 0
    size = copy if on_cpu else -(-gpus_of_recipe // copy) * copy
    return size, "cpu" if on_cpu else "gpu"


def _recommended(recipe: Recipe, dataset: Any, *, adapted: bool) -> int:
    from trainer.config import FinetuningDatasetConfig  # noqa: PLC0415

    if adapted:
        return recipe.peft_gpus
    return recipe.sft_gpus if isinstance(dataset, FinetuningDatasetConfig) else recipe.gpus


def _show(config: RunConfig, *, recipe: str | None, world_size: int, device: str, every: bool) -> None:
    from trainer.settings import yaml_io  # noqa: PLC0415
    from trainer.settings.resolve import resolve  # noqa: PLC0415
    from trainer.settings.values import plain  # noqa: PLC0415

    resolved = resolve(config, world_size=world_size, device=device)
    for line in _figures(resolved.config, world_size=world_size, device=device):
        click.echo(f"# {line}")
    for choice in resolved.explanations:
        click.echo(f"# {choice.setting} = {plain(choice.value)}: {choice.why}")
    for warning in resolved.warnings:
        click.echo(f"warning: {warning}", err=True)
    if every:
        click.echo("# every setting as it is here; given to --config, this leaves nothing open")
    text = yaml_io.dump(resolved.config, made=config) if every else yaml_io.to_yaml(_explicit(config, recipe))
    click.echo(text, nl=False)


def _explicit(config: RunConfig, recipe: str | None) -> dict[str, Any]:
    """Return the settings that differ from the defaults or from the recipe: enough to make the same run again."""
    from trainer.arguments import initial_run  # noqa: PLC0415
    from trainer.config import FinetuningDatasetConfig, RunConfig  # noqa: PLC0415
    from trainer.model import from_hf_config  # noqa: PLC0415
    from trainer.settings import yaml_io  # noqa: PLC0415

    hf_config, peft = getattr(config.model, "hf_config", None), config.peft
    kind = "peft_config" if peft else "sft_config" if isinstance(config.dataset, FinetuningDatasetConfig) else "pretrain_config"
    first = initial_run(recipe, {} if recipe else {"model": {"hf_config": hf_config}}, kind)
    model = from_hf_config(hf_config or first.model.hf_config)
    defaults = RunConfig(model=model, dataset=type(config.dataset)(), peft=type(peft)() if peft else None)
    explicit = yaml_io.changes(config, defaults, first)
    all_settings = yaml_io.as_mapping(config)[0]
    if not recipe:
        explicit["model"] = {"hf_config": all_settings["model"]["hf_config"], **explicit.get("model", {})}
    # A file says by these two which of a recipe's runs it changes.
    explicit["peft"] = {"name": all_settings["peft"]["name"], **explicit.get("peft", {})} if peft else "none"
    if kind != "pretrain_config":
        explicit.setdefault("dataset", {})["packed"] = config.dataset.packed
    return {"recipe": recipe, **explicit} if recipe else explicit


def _figures(config: RunConfig, *, world_size: int, device: str) -> list[str]:
    from trainer.estimate.memory import memory, parameters  # noqa: PLC0415

    unit, many = ("GPU", "GPUs") if device == "gpu" else ("process", "processes")
    units = unit if world_size == 1 else many
    estimate = memory(config, world_size=world_size)
    return [
        f"parameters: {parameters(config.model):,}",
        *_trained(config.model, config.peft),
        f"memory of the fullest of {world_size} {units}, estimated: {size(estimate.total)}{_fits(estimate.total, device)}",
        *(f"  {part.name}: {size(part.size)}, {part.why}" for part in estimate.parts),
        *_uneven(estimate, device),
        *_flops(config),
    ]


def _uneven(estimate: Estimate, device: str) -> list[str]:
    """Return a line with the memory that a run needs if routing is as uneven as possible; none where that changes nothing."""
    if estimate.uneven == estimate.total:
        return []
    return [f"the same if all tokens go to the experts of one rank: {size(estimate.uneven)}{_fits(estimate.uneven, device)}"]


def _flops(config: RunConfig) -> list[str]:
    from trainer.estimate.flops import flops_of_run  # noqa: PLC0415

    try:
        return [f"FLOPs per token, forward and backward: {flops_of_run(config):.4g}"]
    except UserError as error:
        return [f"FLOPs per token: {error.args[0]}"]


_CARDS = (16, 24, 40, 48, 80, 96, 141, 192)
"""Memory of NVIDIA's cards, in GB."""


def _fits(size: int, device: str) -> str:
    """Name the smallest card that leaves a tenth free, for what is outside torch's allocator."""
    card = next((card for card in _CARDS if size * 1.1 <= card * 1e9), None)
    if device == "cpu":
        return ""
    return f" of a card's {card}" if card else f", more than any card of {_CARDS[-1]} GB has"


def _trained(model: Any, peft: Any) -> list[str]:
    from trainer.estimate import built  # noqa: PLC0415

    if peft is None:
        return []
    parameters = built.count_whole(model, peft)
    return [f"trained: {number(parameters.trained.total)} of {number(parameters.total)} parameters"]
