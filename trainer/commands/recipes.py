"""`mbtrain recipes`: list the recipes, one line each. Imports no torch."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from trainer.recipe import Recipe


@click.command("recipes", epilog="Example: mbtrain recipes qwen3")
@click.argument("beginning", default="")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(*, beginning: str, as_json: bool) -> None:
    """List the recipes, and the GPUs that they take.

    With a BEGINNING, only those whose names begin with it.

    Parameters, parallelism and precision of pretraining, and the fewest GPUs of 80 GB for pretraining, for fine-tuning all
    parameters (SFT), and for adapters (PEFT).
    """
    from trainer import recipes  # noqa: PLC0415

    matching = [recipe for name, recipe in recipes.every().items() if name.startswith(beginning)]
    if not matching:
        recipes.find(beginning)  # which suggests another
    rows = [_row(recipe) for recipe in matching]
    if as_json:
        click.echo(json.dumps({row.pop("name"): row for row in rows}))
    elif sys.stdout.isatty():
        _show_table(rows)
    else:
        for cells in (_HEADER, *map(_cells, rows)):
            click.echo(_line(cells))


def _row(recipe: Recipe) -> dict[str, Any]:
    from trainer.recipe import parallelism  # noqa: PLC0415

    return {
        "name": recipe.name,
        "parameters": recipe.parameters,
        "parallelism": parallelism(recipe.layout) or "none",
        "precision": recipe.precision,
        "gpus": recipe.gpus,
        "sft_gpus": recipe.sft_gpus,
        "peft_gpus": recipe.peft_gpus,
        "summary": recipe.summary,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    billions = row["parameters"] / 1e9
    size = f"{billions:.2f}B" if billions >= 0.1 else f"{billions * 1e3:.1f}M"
    gpus = [str(row[name] or "CPU") for name in ("gpus", "sft_gpus", "peft_gpus")]
    return [row["name"], size, row["parallelism"], row["precision"], *gpus, row["summary"]]


_HEADER = ["recipe", "size", "parallelism", "precision", "GPUs", "SFT", "PEFT", "what it is"]


def _line(cells: list[str]) -> str:
    name, size, parallelism, precision, pretrain, sft, peft, summary = cells
    return f"{name:<17} {size:>8}  {parallelism:<18} {precision:<11} {pretrain:>4} {sft:>4} {peft:>4}  {summary}"


def _show_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    gpus = ("GPUs to pretrain", "SFT", "PEFT")
    table = Table("recipe", "parameters", "parallelism", "precision", *gpus, "what it is", box=None, header_style="bold")
    for _, family in groupby(rows, lambda row: row["name"].partition("_")[0]):
        if table.row_count:
            table.add_row()
        for row in family:
            table.add_row(*_cells(row))
    Console().print(table)
