"""Parse the arguments of `mbconvert`, run the command, and exit.

Exit codes: 0 done, 1 failed or different, 2 wrong arguments, 130 and 143 stopped by Ctrl-C and SIGTERM. Results go to stdout;
progress, notes and errors go to stderr. Each command imports its code when it runs, so `--help` answers at once.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
from typing import Any

import click

from converter.cli_editing import average, extend_vocab
from converter.cli_options import WORKERS, Command, conversion, execution
from converter.memory import seldom_collected
from formats.dtypes import MODEL_DTYPES, QUANTIZED

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

_LARGEST = 1 << 62
"""Bytes; file offsets cannot count more."""


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Return `5GB`, `500MB`, `2GiB` or a plain number as bytes."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*([a-z]*)", value.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if not 1 <= size < _LARGEST:
        raise click.BadParameter(f"`{value[:40]}` is not a size; try 5GB or 500MB", context, parameter)
    return size


def _stages(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Return `9,9,8,6`, `Et*9|t*9|t*8|t*6L` or `*-*|-*-` once it is known to be layers per pipeline stage."""
    if value is None:
        return None
    from converter.pipeline_layout import parse_layout  # noqa: PLC0415
    from formats.errors import UserError  # noqa: PLC0415

    try:
        parse_layout(value)
    except UserError as error:
        raise click.BadParameter(f"{error.args[0]}; {error.hint}", context, parameter) from error
    return value


_COUNT = click.IntRange(min=1)


def _layout(command: Command) -> Command:
    """Add the options that lay out a Megatron checkpoint."""
    options = [
        click.option("--layout", type=click.Choice(["gpt", "hybrid"]), help="Layers and names of megatron-core's GPTModel or of "
                     "its HybridModel. [default: that of a Megatron source; else gpt, where GPTModel can express the family]"),
        click.option("--tp", "--tensor-model-parallel-size", "tp", type=_COUNT, default=1, show_default=True, metavar="N",
                     help="Tensor-parallel size."),
        click.option("--pp", "--pipeline-model-parallel-size", "pp", type=_COUNT, default=1, show_default=True, metavar="N",
                     help="Pipeline-parallel size."),
        click.option("--vpp", type=_COUNT, default=1, show_default=True, metavar="N",
                     help="Virtual pipeline stages per pipeline rank."),
        click.option("--pp-layout", callback=_stages, metavar="LAYOUT",
                     help="Layers per pipeline stage, all ranks of the first virtual stage first: 9,9,8,6, or Megatron's "
                     "Et*9|t*9|t*8|t*6L; of layout hybrid also its pattern, *-*|-*-."),
        click.option("--ep", "--expert-model-parallel-size", "ep", type=_COUNT, default=1, show_default=True, metavar="N",
                     help="Expert-parallel size: experts are divided among N ranks."),
        click.option("--etp", "--expert-tensor-parallel-size", "etp", type=_COUNT, metavar="N",
                     help="Tensor-parallel size of each expert. [default: that of other layers, --tp; 1 if experts have biases]"),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


_values_from = click.option("--from", "values_from", type=click.Choice(["weights", "master"]), default="weights",
                            show_default=True, help="Take the weights, or the fp32 masters in the optimizer state, which must "
                            "round to them.")  # fmt: skip

_vocab_multiple = click.option("--make-vocab-size-divisible-by", type=_COUNT, default=128, show_default=True, metavar="N",
                               help="Pad the vocabulary to a multiple of N × TP.")  # fmt: skip

_max_shard_size = click.option(
    "--max-shard-size", callback=_size, metavar="SIZE", help="Largest size of one safetensors file, such as 5GB."
)


_FORMER_NAMES = {
    "--any-base": "--allow-other-base",
    "--as": "--cast-to",
    "--vocab-divisible-by": "--make-vocab-size-divisible-by",
}


class _Commands(click.Group):
    """A group whose commands answer the former name of an option with its present name."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            present = _FORMER_NAMES.get(error.option_name, "")
            if error.ctx and any(present in option.opts for option in error.ctx.command.params):
                raise click.UsageError(f"there is no option `{error.option_name}`; write `{present}`", error.ctx) from error
            raise


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mbtools", prog_name="mbconvert")
def cli() -> None:
    """Convert model weights between Hugging Face safetensors and Megatron distributed checkpoints.

    Conversions are bit-exact and stream on any CPU. Memory grows with the number of tensors, not with their size.
    """


@cli.command("hf-to-mcore", epilog="Example: mbconvert hf-to-mcore Llama-3.2-1B megatron --tp 8 --pp 4")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--hf-config", metavar="DIR", help="Use the `config.json` and side files of DIR, for an SRC that has none.")
@_layout
@_vocab_multiple
@click.option("--ckpt-format", type=click.Choice(["torch_dist", "torch", "fsdp_dtensor"]), default="torch_dist",
              show_default=True, help="Format of DST: torch_dist, which loads in any layout; torch, a file for each rank "
              "(mp_rank_*), as older scripts of Megatron-LM read; fsdp_dtensor, for Megatron-FSDP.")  # fmt: skip
@click.option("--transformer-impl", type=click.Choice(["transformer_engine", "local"]), default="transformer_engine",
              show_default=True, help="Layers whose names DST has in torch and fsdp_dtensor: Transformer Engine's, with all "
              "experts of a rank grouped; or megatron-core's own.")  # fmt: skip
@conversion
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
@click.option("--hf-config", metavar="DIR", help="Use the `config.json` and side files of DIR instead of those in SRC.")
@_max_shard_size
@click.option("--quantize", type=click.Choice(QUANTIZED), help="Quantize linear weights anew, with new scales.")
@_values_from
@conversion
def mcore_to_hf(source: str, target: str, **options: Any) -> None:
    """Convert a Megatron checkpoint to Hugging Face.

    SRC is the root of a checkpoint or one `iter_*` directory in it; DST becomes a model directory.
    """
    from converter.console import convert  # noqa: PLC0415
    from converter.convert import mcore_to_hf  # noqa: PLC0415

    convert(mcore_to_hf, source, target, **options)


@cli.command("reshard", epilog="Example: mbconvert reshard megatron megatron-tp4 --tp 4 --pp 2")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@_layout
@click.option("--make-vocab-size-divisible-by", type=_COUNT, metavar="N",
              help="Pad the vocabulary to a multiple of N × TP. [default: what SRC says, else 128]")  # fmt: skip
@click.option("--hf-config", metavar="DIR", help="Use the `config.json` and side files of DIR, for an SRC that has none.")
@click.option("--weights-only", is_flag=True, help="Leave out optimizer state and what else resumes a run.")
@_values_from
@conversion
def reshard(source: str, target: str, **options: Any) -> None:
    """Write a Megatron checkpoint in another layout.

    SRC is the root of a checkpoint of any kind or one `iter_*` directory in it; DST becomes a `torch_dist` checkpoint of the same
    weights and optimizer state, from which a run goes on.
    """
    from converter.console import convert  # noqa: PLC0415
    from converter.convert import reshard  # noqa: PLC0415

    convert(reshard, source, target, **options)


@cli.command("merge", epilog="Example: mbconvert merge Llama-3.2-1B adapter Llama-merged")
@click.argument("base", metavar="BASE")
@click.argument("adapter", metavar="ADAPTER")
@click.argument("target", metavar="DST")
@click.option("--to", type=click.Choice(["hf", "mcore"]), help="Format of DST. [default: that of BASE]")
@click.option("--allow-other-base", is_flag=True, help="Merge even if ADAPTER was trained on another model.")
@click.option(
    "--hf-config",
    metavar="DIR",
    help="Use the `config.json` and side files of DIR: instead of those in a Megatron BASE, or for a BASE that has none.",
)
@_layout
@_vocab_multiple
@_max_shard_size
@conversion
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
@click.option("--base", required=True, metavar="MODEL", help="The model the adapter was trained on: a directory in "
              "either format, a URL or a Hub id.")  # fmt: skip
@click.option("--canonical/--fused", default=True, show_default=True,
              help="Separate adapters for query, key, value, gate and up, as in PEFT; or one per fused layer.")  # fmt: skip
@click.option("--layout", type=click.Choice(["gpt", "hybrid"]), help="The layout of the model to be trained. [default: that of a "
              "Megatron base; else gpt, where GPTModel can express the family]")  # fmt: skip
@execution
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
@click.option("--experts", type=click.Choice(["fused", "separate"]), default="fused", show_default=True, help="Adapters of "
              "experts: all of a layer together, for PEFT with transformers 5; or a module for each, for vLLM.")  # fmt: skip
@execution
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
    help="Read everything and compare it with the stored hashes (of files in a Megatron checkpoint, of tensors in a Hugging Face "
    "model), and weights with the fp32 masters in the optimizer state. Exit 1 if anything differs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.pass_context
def inspect_command(context: click.Context, path: str, *, tensors: bool, check: bool, as_json: bool) -> None:
    """Describe a checkpoint from its headers.

    Prints format, writer, family, sizes, dtypes and layout of PATH: a directory, a URL or a Hub id.
    """
    from converter import console  # noqa: PLC0415
    from converter.report import inspect_checkpoint  # noqa: PLC0415

    if check and tensors:
        raise click.UsageError("`--tensors` and `--check` cannot be combined")
    if check:
        context.exit(console.check(path, as_json=as_json))
    console.show_report(inspect_checkpoint(path, tensors=tensors), as_json=as_json)


@cli.command("verify", epilog="Example: mbconvert verify Llama-3.2-1B megatron")
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@click.option("--cast-to", type=click.Choice(MODEL_DTYPES), help="Cast both before comparing.")
@click.option("--workers", type=WORKERS, metavar="N", help="Number of threads. [default: the number of cores, 2 to 4]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit code is the answer.")
@click.pass_context
def verify_command(context: click.Context, one: str, other: str, **options: Any) -> None:
    """Compare two checkpoints bit for bit.

    A and B may differ in format, layout and writer. Exit 0 if they hold the same weights, 1 if not.
    """
    from converter import console  # noqa: PLC0415

    context.exit(console.verify(one, other, **options))


@cli.command("families", epilog="Example: mbconvert families --json")
@click.option("--all", "every", is_flag=True, help="List unsupported model types too, and why they are not supported.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def families_command(*, every: bool, as_json: bool) -> None:
    """List the supported model families."""
    from converter.console import show_families  # noqa: PLC0415

    show_families(every=every, as_json=as_json)


cli.add_command(average)
cli.add_command(extend_vocab)


def _install_signal_handlers() -> None:
    """Make SIGTERM and Ctrl-C stop a run so that it can be resumed. A SIGINT that the parent had ignored stays ignored."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def _stop(number: int, _frame: object) -> None:
    """Stop at the first signal. torchrun sends SIGTERM after Ctrl-C, which is ignored; a second Ctrl-C exits at once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, _exit_at_once)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(_TERMINATED)


def _exit_at_once(_number: int, _frame: object) -> None:
    os._exit(_INTERRUPTED)


@seldom_collected()
def main() -> None:
    """Run the program. Errors that a user can fix are shown without a traceback."""
    from converter.streams import prepare  # noqa: PLC0415
    from formats.errors import UserError  # noqa: PLC0415

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads would be idle and take 50 ms to start
    _install_signal_handlers()
    prepare()
    try:
        sys.exit(cli.main(standalone_mode=False))
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        _print_failure_as_json(str(error.args[0]), error.hint)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        _print_failure_as_json(error.format_message())
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        _print_failure_as_json("interrupted")
        sys.exit(_INTERRUPTED)
    except SystemExit as stopped:
        if stopped.code == _TERMINATED:
            click.echo("terminated", err=True)
            _print_failure_as_json("terminated")
        raise
    finally:
        gc.freeze()  # else Python traverses all objects once more at its exit: 25 ms


def _print_failure_as_json(message: str, hint: str = "") -> None:
    """Print the error as JSON if `--json` was given: a program that reads stdout always gets one object."""
    if "--json" in sys.argv[1:]:
        click.echo(json.dumps({"error": message, "hint": hint}))
