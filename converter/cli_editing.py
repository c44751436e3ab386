"""The commands of `mbconvert` that write other weights than their sources have."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from converter.cli_options import INTEGRITY, execution


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    """Return `1,3` as numbers."""
    try:
        return None if value is None else [float(number) for number in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"`{value}` is not a list of numbers; try 1,3", context, parameter) from error


@click.command("average", epilog="Example: mbconvert average step-900 step-1000 averaged --weights 1,3")
@click.argument("sources", metavar="A B...", nargs=-1, required=True)
@click.argument("target", metavar="DST")
@click.option("--weights", callback=_numbers, metavar="W,W...", help="A number for each checkpoint, of which each is divided by "
              "their sum: 1,3 is a quarter and three quarters. [default: equal]")  # fmt: skip
@click.option("--from", "values_from", type=click.Choice(["weights", "master"]), help="Average the weights, or the fp32 masters "
              "in the optimizer state of Megatron checkpoints. [default: master, where all have them]")  # fmt: skip
@click.option("--hf-config", metavar="DIR", help="Use the `config.json` and side files of DIR, for checkpoints without.")
@INTEGRITY
@execution
def average(sources: tuple[str, ...], target: str, **options: Any) -> None:
    """Average checkpoints of one model.

    A, B and so on are all Hugging Face directories or all Megatron checkpoints; DST becomes one like the first, with its layout
    and side files. Sums are fp32, in the order given, and rounded once. Optimizer state is left out.
    """
    from converter.console import convert  # noqa: PLC0415
    from converter.editing import average_checkpoints  # noqa: PLC0415

    convert(partial(average_checkpoints, sources), target, **options)


@click.command("extend-vocab", epilog="Example: mbconvert extend-vocab Llama-3.2-1B extended --to 128512")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--to", type=click.IntRange(min=1), required=True, metavar="N", help="The number of tokens that DST has.")
@click.option("--init", default="mean", show_default=True, metavar="zero|mean|FILE", help="New rows: zeros; the mean of all "
              "tokens' rows; or those of a safetensors FILE, one tensor [new tokens, hidden] for embedding and output layer, or "
              "one for each under its Hugging Face name.")  # fmt: skip
@click.option("--hf-config", metavar="DIR", help="Use the `config.json` and side files of DIR, for an SRC that has none.")
@click.option("--weights-only", is_flag=True, help="Leave out optimizer state and what else resumes a run.")
@INTEGRITY
@execution
def extend_vocab(source: str, target: str, **options: Any) -> None:
    """Give a model more tokens, or fewer.

    SRC is a Hugging Face directory or a Megatron checkpoint; DST becomes the same with N rows in its embedding and its output
    layer. Rows of tokens that stay are kept bit for bit. `config.json` gets the new size; the tokenizer's files are copied.
    """
    from converter.console import convert  # noqa: PLC0415
    from converter.editing import extend_vocab  # noqa: PLC0415

    convert(extend_vocab, source, target, **options)
