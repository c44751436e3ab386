"""`mbconvert`: arguments in, exit code out (0 done, 1 failed or different, 2 misuse, 130 and 143 stopped by Ctrl-C and SIGTERM).

Data on stdout, talk on stderr.

Commands import what they need when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from converter.memory import seldom_collected
from converter.workers import MOST_WORKERS
from formats.dtypes import MODEL_DTYPES

_UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_INTERRUPTED, _TERMINATED = 130, 143
_DTYPES = click.Choice(["keep", *MODEL_DTYPES])


_LARGEST = 1 << 62
"""Bytes that file offsets can count."""


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """`5GB`, `500MB`, `2GiB` or a number of bytes, as bytes."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*([a-z]*)", value.strip().lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if not 1 <= size < _LARGEST:
        raise click.BadParameter(f"`{value[:40]}` is not a size; try 5GB or 500MB", context, parameter)
    return size


def _stages(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """`9,9,8,6` as layers per pipeline stage."""
    if value is None:
        return None
    parts = value.split(",")
    if not all(re.fullmatch(r"\d{1,6}", part.strip()) for part in parts):
        raise click.BadParameter(f"`{value[:40]}` is not a list of layers per stage; try 9,9,8,6", context, parameter)
    return [int(part) for part in parts]


_COUNT = click.IntRange(min=1)
_WORKERS = click.IntRange(1, MOST_WORKERS)

_Command = Callable[..., None]


def _common(command: _Command) -> _Command:
    """The options both directions share."""
    options = [
        click.option("--dtype", type=_DTYPES, default="keep", show_default=True, help="Cast weights."),
        click.option("--integrity/--no-integrity", default=True, show_default=True,
                     help="Write hashes: the sha256 of every file of a Megatron checkpoint, as megatron-core checks them, "
                     "and the BLAKE3 of every tensor."),
    ]  # fmt: skip
    command = _how(command)
    for option in reversed(options):
        command = option(command)
    return command


def _how(command: _Command) -> _Command:
    """How to carry out whatever writes an output."""
    options = [
        click.option("--workers", type=_WORKERS, metavar="N", help="Threads; the bytes written do not depend on it."),
        click.option("--dry-run", is_flag=True, help="Print every file and its size, memory and disk; move nothing."),
        click.option("--overwrite", is_flag=True, help="Replace DST, once the new output is whole."),
        click.option("--verify", is_flag=True, help="Read back what lies on the disk and compare, before DST appears."),
        click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped, if there was one."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout at the end."),
        click.option("--quiet", is_flag=True, help="No progress and no notes."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _layout(command: _Command) -> _Command:
    """The options of what writes a Megatron checkpoint."""
    options = [
        click.option("--tp", type=_COUNT, default=1, show_default=True, metavar="N", help="Tensor-parallel size."),
        click.option("--pp", type=_COUNT, default=1, show_default=True, metavar="N", help="Pipeline-parallel size."),
        click.option("--vpp", type=_COUNT, default=1, show_default=True, metavar="N", help="Virtual stages per pipeline rank."),
        click.option("--pp-layout", callback=_stages, metavar="N,N,…",
                     help="Layers per stage, all ranks of the first virtual stage first."),
        click.option("--vocab-divisible-by", type=_COUNT, default=128, show_default=True, metavar="N",
                     help="Pad the vocabulary to a multiple of N × TP."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


_max_shard_size = click.option(
    "--max-shard-size", callback=_size, metavar="SIZE", help="Size of a safetensors file at most, such as 5GB."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mbtools", prog_name="mbconvert")
def cli() -> None:
    """Move model weights between Hugging Face safetensors and Megatron distributed checkpoints.

    Streams, on any CPU, bit-exact, in memory that grows with the number of tensors and not with their size.
    """


@cli.command("hf-to-mcore", epilog="Example: mbconvert hf-to-mcore Llama-3.2-1B megatron --tp 8 --pp 4")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@_layout
@_common
def hf_to_mcore(source: str, target: str, **options: Any) -> None:
    """Convert a Hugging Face model to Megatron.

    SRC is a directory, a Hub id or a URL; DST becomes a Megatron distributed checkpoint.
    """
    from converter.console import convert  # noqa: PLC0415
    from converter.convert import hf_to_mcore  # noqa: PLC0415

    convert(hf_to_mcore, source, target, **options)


@cli.command("mcore-to-hf", epilog="Example: mbconvert mcore-to-hf megatron Llama-back --max-shard-size 5GB")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--hf-config", metavar="DIR", help="Follow the `config.json` and side files of DIR.")
@_max_shard_size
@_common
def mcore_to_hf(source: str, target: str, **options: Any) -> None:
    """Convert a Megatron checkpoint to Hugging Face.

    SRC is the root of a checkpoint or one `iter_*` directory in it; DST becomes a model directory.
    """
    from converter.console import convert  # noqa: PLC0415
    from converter.convert import mcore_to_hf  # noqa: PLC0415

    convert(mcore_to_hf, source, target, **options)


@cli.command("merge", epilog="Example: mbconvert merge Llama-3.2-1B adapter Llama-merged")
@click.argument("base", metavar="BASE")
@click.argument("adapter", metavar="ADAPTER")
@click.argument("target", metavar="DST")
@click.option("--to", type=click.Choice(["hf", "mcore"]), help="Format of DST; by default that of BASE.")
@click.option("--any-base", is_flag=True, help="Even if ADAPTER was trained beside another model.")
@click.option("--hf-config", metavar="DIR", help="Follow the `config.json` and side files of DIR; for a Megatron BASE.")
@_layout
@_max_shard_size
@_common
def merge(base: str, adapter: str, target: str, **options: Any) -> None:
    """Merge an adapter into the weights of its base.

    DST becomes BASE with ADAPTER added in fp32 and rounded once. BASE and DST are Hugging Face directories or Megatron
    checkpoints; ADAPTER is PEFT's folder, or the Megatron checkpoint of a training run with `peft`.
    """
    from converter.adapters.merge import merge  # noqa: PLC0415
    from converter.console import convert  # noqa: PLC0415

    convert(merge, base, adapter, target, **options)


@cli.command("adapter-to-mcore", epilog="Example: mbconvert adapter-to-mcore adapter megatron-adapter --base Llama-3.2-1B")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--base", required=True, metavar="MODEL", help="The model it was trained beside: a directory of either format, "
              "a URL or a Hub id.")  # fmt: skip
@click.option("--canonical/--fused", default=True, show_default=True,
              help="Separate adapters for query, key, value, gate and up, as PEFT has them; or one per module.")  # fmt: skip
@_how
def adapter_to_mcore(source: str, target: str, **options: Any) -> None:
    """Convert a PEFT adapter to Megatron.

    SRC is a directory or a Hub id; DST becomes a Megatron checkpoint of the adapter alone.
    """
    from converter.adapters.convert import adapter_to_mcore  # noqa: PLC0415
    from converter.console import convert  # noqa: PLC0415

    convert(adapter_to_mcore, source, target, **options)


@cli.command("adapter-to-hf", epilog="Example: mbconvert adapter-to-hf megatron-adapter adapter")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@_how
def adapter_to_hf(source: str, target: str, **options: Any) -> None:
    """Convert a Megatron adapter checkpoint to PEFT.

    SRC is the root of a checkpoint or one `iter_*` directory in it; DST becomes a PEFT directory.
    """
    from converter.adapters.convert import adapter_to_hf  # noqa: PLC0415
    from converter.console import convert  # noqa: PLC0415

    convert(adapter_to_hf, source, target, **options)


@cli.command("inspect", epilog="Example: mbconvert inspect megatron --check")
@click.argument("path", metavar="PATH")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option(
    "--check",
    is_flag=True,
    help="Read it and hold it against the hashes it carries (files of a checkpoint, tensors of a model), and weights against the "
    "fp32 masters in an optimizer's state. Exit 1 if they differ.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def inspect_command(context: click.Context, path: str, *, tensors: bool, check: bool, as_json: bool) -> None:
    """Describe a checkpoint from its headers.

    Prints format, writer, family, sizes, dtypes and layout of PATH: a directory, a URL or a Hub id.
    """
    from converter import console  # noqa: PLC0415
    from converter.report import inspect  # noqa: PLC0415

    if check and tensors:
        raise click.UsageError("`--tensors` lists, `--check` judges: give one of them")
    if check:
        context.exit(console.check(path, as_json=as_json))
    console.show_report(inspect(path, tensors=tensors), as_json=as_json)


@cli.command("verify", epilog="Example: mbconvert verify Llama-3.2-1B megatron")
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@click.option("--as", "cast", type=click.Choice(MODEL_DTYPES), help="Compare after casting both.")
@click.option("--workers", type=_WORKERS, metavar="N", help="Threads.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress; the exit code tells.")
@click.pass_context
def verify_command(context: click.Context, one: str, other: str, **options: Any) -> None:
    """Compare two checkpoints bit for bit.

    A and B may differ in format, layout and writer. Exit 0 if they hold the same weights, 1 if not.
    """
    from converter import console  # noqa: PLC0415

    context.exit(console.verify(one, other, **options))


@cli.command("families", epilog="Example: mbconvert families --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def families_command(*, as_json: bool) -> None:
    """List the supported model families."""
    from converter.console import show_families  # noqa: PLC0415

    show_families(as_json=as_json)


def _stop_well() -> None:
    """Have SIGTERM and Ctrl-C end what is in flight and keep what is done. A Ctrl-C that was to be ignored stays so."""
    signal.signal(signal.SIGTERM, _stopped)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stopped)


def _stopped(number: int, _frame: object) -> None:
    """The first of them. torchrun sends SIGTERM after Ctrl-C, which adds nothing; who presses Ctrl-C again means now."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, _leave_at_once)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(_TERMINATED)


def _leave_at_once(_number: int, _frame: object) -> None:
    os._exit(_INTERRUPTED)


@seldom_collected()
def main() -> None:
    """The program. Errors a user can mend are shown without a traceback."""
    from converter.streams import prepare  # noqa: PLC0415
    from formats.errors import UserError  # noqa: PLC0415

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads have no work here and take 50 ms to start
    _stop_well()
    prepare()
    try:
        sys.exit(cli.main(standalone_mode=False))
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        _failed_as_json(str(error.args[0]), error.hint)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        _failed_as_json(error.format_message())
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        _failed_as_json("interrupted")
        sys.exit(_INTERRUPTED)
    except SystemExit as stopped:
        if stopped.code == _TERMINATED:
            click.echo("terminated", err=True)
            _failed_as_json("terminated")
        raise


def _failed_as_json(message: str, hint: str = "") -> None:
    """Say on stdout too that a command with `--json` failed: a program that reads it always gets one object."""
    if "--json" in sys.argv[1:]:
        click.echo(json.dumps({"error": message, "hint": hint}))
