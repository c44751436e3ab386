"""`mbtrain pack`: pack examples into rows of tokens on disk, once for many runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from formats.home import expanded
from trainer.arguments import is_override, read_run

if TYPE_CHECKING:
    from trainer.data.chat.packed import PackedSplit


@click.command(
    "pack",
    no_args_is_help=True,
    epilog="Example: mbtrain pack llama3_8b packed tokenizer.tokenizer_model=DIR dataset.path=chat.jsonl",
)
@click.argument("words", nargs=-1, metavar="[RECIPE] OUT [SECTION.NAME=VALUE]...")
@click.option("--config", "config_file", metavar="FILE", help="Settings in YAML, over the recipe's.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
def command(words: tuple[str, ...], *, config_file: str | None, as_json: bool, quiet: bool) -> None:
    """Tokenize and pack examples, once for many runs.

    The examples of dataset.path, or of the sources of dataset.blend with their weights, become rows of dataset.sequence_length
    in the new folder OUT.

    A run with dataset.path=OUT then starts at once, on rows as full as can be. The folder is for the tokenizer and the sequence
    length that it was made with.
    """
    from trainer.checkpoints.contents import tokenizer_of_run  # noqa: PLC0415 - seconds to import
    from trainer.data.chat import build, packed  # noqa: PLC0415
    from trainer.settings.defaults import apply_defaults  # noqa: PLC0415
    from trainer.settings.resolve import padded_examples  # noqa: PLC0415

    recipe, out, overrides = _split_words(words)
    config = read_run(recipe, config_file=config_file, overrides=overrides, finetune=True)
    apply_defaults(config, padded_examples(config.model, config.dataset))
    tokenizer, notes = build.require_tokenizer(tokenizer_of_run(config)), list[str]()
    splits = packed.pack(config.dataset, out, tokenizer=tokenizer, vocab_size=config.model.vocab_size, note=notes.append)
    if as_json:
        click.echo(json.dumps([asdict(split) for split in splits]))
    elif not quiet:
        for line in (*_lines(splits), *notes):
            click.echo(line, err=True)
        click.echo(f"done: {out}", err=True)


def _split_words(words: tuple[str, ...]) -> tuple[str | None, Path, list[str]]:
    """Return the recipe, the folder OUT, and the overrides, which have a `=` or begin with an override's prefix."""
    names = [word for word in words if not is_override(word)]
    if not 0 < len(names) < 3:
        raise click.UsageError(f"expected a recipe and the folder to create, not {len(names)} words")
    return names[0] if len(names) == 2 else None, Path(expanded(names[-1])), [word for word in words if word not in names]


def _lines(splits: list[PackedSplit]) -> list[str]:
    """Return lines that describe each source once, then each split; sources are named where a split has several."""
    several = len({part.source for part in splits}) > 1
    sources = dict.fromkeys(
        line for part in splits for line in (f"`{part.source}`: {part.said}" if several else part.said, *part.reasons)
    )
    rows = (
        f"{part.split}{f', `{part.source}`' if several else ''}: {part.examples:,} examples in {part.rows:,} rows, "
        f"{100 * part.filled:.1f} % filled{f', weight {part.weight:g}' if part.weight else ''}"
        for part in splits
    )
    return [*sources, *rows]
