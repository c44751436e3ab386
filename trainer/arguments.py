"""Read a run's configuration from a command line: a recipe, a YAML file over it, overrides over both.

Shared by all commands that take a run.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from formats.errors import UserError
from formats.faults import fault
from formats.home import expanded

if TYPE_CHECKING:
    from trainer.config import RunConfig


class HomePath(click.Path):
    """A path whose leading `~` is the home directory, also where no shell replaces it, as in `--out=~/x`."""

    def __init__(self, **checks: Any) -> None:
        super().__init__(path_type=Path, **checks)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Expand `~`; `-` stays as it is where it stands for standard input."""
        return value if value == "-" and self.allow_dash else super().convert(expanded(value), param, ctx)


class _NumProcesses(click.ParamType):
    """A number of processes, or `gpu` for one for each GPU of this machine."""

    name = "N|gpu"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of processes."""
        if value != "gpu":
            return click.IntRange(1).convert(value, param, ctx)
        import torch  # noqa: PLC0415 - seconds to import

        return torch.cuda.device_count() or self.fail("torch finds no GPU on this machine", param, ctx)


def num_processes(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--nproc N` or `--nproc gpu`, passed as `nproc`."""
    text = "Start N processes on this machine, or one for each GPU. Under torchrun or Slurm leave it out."
    return click.option("--nproc", type=_NumProcesses(), metavar="N|gpu", help=text)(command)


def run_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """Add `[RECIPE] [--config FILE] [section.name=value ...]`, passed as `words` and `config_file`."""
    command = click.option("--config", "config_file", metavar="FILE", help="Settings in YAML, over the recipe's.")(command)
    return click.argument("words", nargs=-1, metavar="[RECIPE] [SECTION.NAME=VALUE]...")(command)


def is_override(word: str) -> bool:
    """Tell whether a word is an override: `name=value`, `+name` or `~name`. `~/folder` is a path."""
    return "=" in word or word[:1] == "+" or (word[:1] == "~" and word != "~" and "/" not in word)


def recipe_and_overrides(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split words into the recipe, which is the first word unless that is an override, and the overrides."""
    if words and not is_override(words[0]):
        return words[0], list(words[1:])
    return None, list(words)


def read_run(
    recipe: str | None,
    *,
    config_file: str | Path | None = None,
    overrides: Iterable[str] = (),
    finetune: bool = False,
) -> RunConfig:
    """Return the run that a recipe, a YAML file over it and overrides over both describe.

    Without a recipe, the file names one (`recipe: NAME`) or has the model's `config.json` as `model.hf_config`, or
    `checkpoint.pretrained_checkpoint` names a folder that says what model it holds. With `finetune`, or where `peft` is given, it
    is a run for fine-tuning: adapters, or all parameters for `peft=none`. Raises UserError for what is unknown or does not fit.
    """
    from trainer.settings import hf_config, paths, yaml_io  # noqa: PLC0415
    from trainer.settings import overrides as hydra  # noqa: PLC0415

    document = _read(config_file) if config_file else {}
    overrides = list(overrides)
    config = initial_run(
        _recipe_name(recipe, document.pop("recipe", None), config_file),
        document,
        _kind(document, overrides, finetune=finetune),
        folder=_folder(document, overrides),
    )
    before = copy.deepcopy(getattr(config.model, "hf_config", None))
    _note_ignored(yaml_io.apply(config, document))
    hydra.apply(config, overrides)
    if getattr(config.model, "hf_config", None) != before:
        hf_config.check(config.model)
    paths.expand(config)
    return config


def named_recipe(recipe: str | None, config_file: str | Path | None) -> str | None:
    """Return the recipe that the command or the file names."""
    return _recipe_name(recipe, _read(config_file).get("recipe") if config_file else None, config_file)


def _read(file: str | Path) -> dict[str, Any]:
    from trainer.settings import yaml_io  # noqa: PLC0415

    try:
        text = Path(expanded(file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read `{file}`: {fault(error)}", hint="give a YAML file") from error
    return yaml_io.load(text, source=str(file))


def _recipe_name(recipe: str | None, in_file: Any, file: object) -> str | None:
    if recipe and in_file and recipe != in_file:
        raise UserError(f"the command says recipe `{recipe}`, and `{file}` says `{in_file}`", hint="leave out one of them")
    return recipe or (str(in_file) if in_file else None)


_NOTHING = (None, "none", "null", "None", "")


def _kind(document: dict[str, Any], overrides: Sequence[str], *, finetune: bool) -> str:
    """Return which of a recipe's runs is meant. A complete document of a pretraining run has `peft: null` too."""
    methods = [word.partition("=")[2] for word in overrides if word.lstrip("+").partition("=")[0] == "peft"]
    method = methods[-1] if methods else document.get("peft")
    has_method = bool(methods) or "peft" in document
    if isinstance(method, dict) or method not in _NOTHING or (finetune and not has_method):
        return "peft_config"
    dataset = document.get("dataset")
    return "sft_config" if methods or finetune or (isinstance(dataset, dict) and "packed" in dataset) else "pretrain_config"


def _folder(document: dict[str, Any], overrides: Sequence[str]) -> str | None:
    """Return the folder that `checkpoint.pretrained_checkpoint` names; the last override wins."""
    section = document.get("checkpoint")
    folder = section.get("pretrained_checkpoint") if isinstance(section, dict) else None
    for word in overrides:
        name, _, value = word.lstrip("+").partition("=")
        folder = value.strip("'\"") if name == "checkpoint.pretrained_checkpoint" else folder
    return None if folder in _NOTHING else expanded(str(folder))


def initial_run(name: str | None, document: dict[str, Any], kind: str, *, folder: str | None = None) -> RunConfig:
    """Return the run that a recipe's function `kind` makes, or one for the model that a document or a folder describes."""
    if name is not None:
        from trainer import recipes  # noqa: PLC0415

        return getattr(recipes.find(name), kind)()
    model = document.get("model")
    hf_config = model.get("hf_config") if isinstance(model, dict) else None
    if isinstance(hf_config, dict) and hf_config:
        return _without_recipe(hf_config, kind)
    if folder:
        from trainer.checkpoints.contents import describe  # noqa: PLC0415

        hf_config = describe(folder).config
        return _without_recipe(hf_config, "continued" if kind == "pretrain_config" else kind)
    raise UserError(
        "there is no recipe to start from",
        hint="name one (`mbtrain recipes` lists them), or a folder with a model (`checkpoint.pretrained_checkpoint=DIR`), or a "
        "file with `recipe: NAME` or with `model.hf_config`",
    )


def _without_recipe(hf_config: dict[str, Any], kind: str) -> RunConfig:
    from trainer import recipe  # noqa: PLC0415
    from trainer.config import RunConfig  # noqa: PLC0415
    from trainer.model import from_hf_config  # noqa: PLC0415

    provider = from_hf_config(hf_config)
    if kind == "pretrain_config":
        return RunConfig(model=provider)
    make = {"sft_config": recipe.tuning_all, "peft_config": recipe.tuning_adapters, "continued": recipe.continuing}[kind]
    return make(hf_config, sequence_length=min(4096, provider.seq_length))


def _note_ignored(ignored: Sequence[str]) -> None:
    if ignored and os.environ.get("RANK", "0") == "0":
        click.echo(f"note: ignored, since a file holds values and no classes: {', '.join(ignored)}", err=True)
