"""`mbtrain prepare-data`: tokenize documents for pretraining."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trainer.arguments import HomePath

if TYPE_CHECKING:
    from trainer.data.prepare import Summary


@click.command("prepare-data", no_args_is_help=True, epilog="Example: mbtrain prepare-data sources text --tokenizer byte")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@click.argument("prefix", type=HomePath())
@click.option("--tokenizer", required=True, metavar="DIR|byte", help="A folder with tokenizer.json, or `byte`.")
@click.option(
    "--json-key", default="text", show_default=True, help="The key in .jsonl, or the column in .parquet, with the text."
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes that tokenize.  [default: one per core]")
@click.option("--no-append-eod", is_flag=True, help="Put no end-of-document token after each document.")
@click.option("--overwrite", is_flag=True, help="Replace PREFIX.bin and PREFIX.idx, once the new ones are whole.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
def command(
    *,
    inputs: tuple[str, ...],
    prefix: Path,
    tokenizer: str,
    json_key: str,
    workers: int | None,
    no_append_eod: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Tokenize documents for pretraining.

    Writes PREFIX.bin and PREFIX.idx in Megatron-LM's format.

    INPUT is a file or a folder of files: .txt, .md and .py are a document each, .jsonl has one per line, .parquet one per row;
    or a folder that `datasets` saved, or hf://datasets/ORG/NAME. The result does not depend on --workers.
    """
    from converter.console import progress_reporter  # noqa: PLC0415
    from trainer.data.prepare import prepare  # noqa: PLC0415

    with progress_reporter(quiet=quiet) as reporter:
        summary = prepare(
            list(inputs),
            prefix,
            tokenizer=tokenizer,
            key=json_key,
            workers=workers or len(os.sched_getaffinity(0)),
            append_eod=not no_append_eod,
            overwrite=overwrite,
            reporter=reporter,
        )
        if summary.empty:
            reporter.note(f"{summary.empty} documents without text were left out")
    if as_json:
        click.echo(json.dumps(asdict(summary)))
    elif not quiet:
        click.echo(f"done: {_summary(summary)}", err=True)


def _summary(summary: Summary) -> str:
    from converter.console import size  # noqa: PLC0415

    return (
        f"{summary.documents:,} documents, {summary.tokens:,} tokens, {size(summary.input_bytes)} read, "
        f"{size(summary.output_bytes)} written, {summary.seconds:.1f} s ({summary.tokens_per_second:,.0f} tokens/s) "
        f"-> {summary.prefix}"
    )
