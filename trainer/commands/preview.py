"""`mbtrain preview`: show what a model would learn from examples."""

from __future__ import annotations

import os
import sys
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from formats.errors import UserError
from trainer.arguments import read_run, recipe_and_overrides, run_arguments

if TYPE_CHECKING:
    from trainer.config import FinetuningDatasetConfig
    from trainer.data.chat.splits import Subset
    from trainer.tokenizers import Tokenizer

_SPLITS = ("train", "validation", "test")


@click.command("preview", epilog="Example: mbtrain preview llama3_8b tokenizer.tokenizer_model=DIR dataset.path=chat.jsonl")
@run_arguments
@click.option("--examples", "shown", type=click.IntRange(min=0), default=3, show_default=True, help="Examples to show.")
@click.option("--limit", type=click.IntRange(min=1), default=10_000, show_default=True, help="Examples to read for the figures.")
@click.option("--split", type=click.Choice(_SPLITS), default="train", show_default=True, help="Whose examples.")
@click.option("--tokens", "separate", is_flag=True, help="Put `|` between tokens.")
@click.option("--skip-bad", is_flag=True, help="Count examples that cannot be used, as dataset.skip_bad=true does.")
def command(
    words: tuple[str, ...],
    *,
    config_file: str | None,
    shown: int,
    limit: int,
    split: str,
    separate: bool,
    skip_bad: bool,
) -> None:
    """Show examples as a model would learn them.

    Tokens that are learned are in color, or in ⟦brackets⟧.

    Then how many tokens are learned, how many examples are cut or cannot be used, and how long they are. Nothing is trained.
    """
    from trainer.checkpoints.contents import tokenizer_of_run  # noqa: PLC0415
    from trainer.data.chat import build, splits  # noqa: PLC0415 - seconds to import

    recipe, overrides = recipe_and_overrides(words)
    config = read_run(recipe, config_file=config_file, overrides=overrides, finetune=True)
    config.dataset.skip_bad |= skip_bad
    subsets = splits.find_subsets(config.dataset).of(split)
    if not subsets:
        raise UserError(f"there are no examples for {split}", hint=f"set `dataset.{split}_path`, or its share in `dataset.split`")
    tokenizer = build.require_tokenizer(tokenizer_of_run(config))
    for subset in subsets:
        _show(subset, config.dataset, tokenizer, shown=shown, limit=limit, separator="|" if separate else "")


def _show(
    subset: Subset, config: FinetuningDatasetConfig, tokenizer: Tokenizer, *, shown: int, limit: int, separator: str
) -> None:
    from trainer.data.chat.examples import Counts, read_examples  # noqa: PLC0415
    from trainer.data.chat.preview import example_text, fill_line, histogram  # noqa: PLC0415

    counts, lengths, highlight = Counts(), [], _highlight()
    for example in islice(read_examples(subset.source, tokenizer, config, counts=counts), limit):
        lengths.append(len(example.tokens))
        if len(lengths) <= shown:
            click.echo(f"# {example.location}: {len(example.tokens):,} tokens, {int(example.trained.sum()):,} trained on")
            click.echo(example_text(example, tokenizer, highlight=highlight, separator=separator) + "\n", color=True)
    click.echo(f"the first {counts}" if len(lengths) == limit else f"{counts}")
    for line in (*counts.reasons(), fill_line(lengths, config.sequence_length), "tokens per example:", *histogram(lengths)):
        click.echo(line)


def _highlight() -> Any:
    """Return the function that highlights learned text: in color, or in brackets where there are no colors."""
    from trainer.data.chat.preview import brackets  # noqa: PLC0415

    plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    return brackets if plain else partial(click.style, fg="green", bold=True)
