"""Write a checkpoint with other weights than its source has: the average of several, or another vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Unpack

from converter.adapter_files import refuse_adapter
from converter.averaging import AverageOptions, average_megatron, average_models
from converter.checks import check_execution, check_locations, check_options, check_values_from
from converter.conversion import Conversion
from converter.execute import execute
from converter.execution import ExecutionOptions, Reporter, Summary
from converter.extending import MEAN, ZERO, ExtendOptions, extend_megatron, extend_model
from converter.memory import seldom_collected
from converter.sources import open_source, workers_for
from converter.values import KEEP
from formats.detect import detect, open_checkpoint
from formats.disk import user_errors
from formats.errors import UserError
from formats.folder import FileRef, Folder, LocalFolder
from formats.home import expanded
from formats.huggingface import HuggingFaceReader
from formats.megatron_reader import MegatronReader


@user_errors()
@seldom_collected()
def average_checkpoints(
    sources: Sequence[str | Path],
    target: str | Path,
    *,
    weights: Sequence[float] | None = None,
    values_from: str | None = None,
    hf_config: str | Path | None = None,
    integrity: bool = True,
    reporter: Reporter | None = None,
    **options: Unpack[ExecutionOptions],
) -> Summary:
    """Write the average of checkpoints of one model, which are all Hugging Face directories or all Megatron checkpoints.

    `weights` has one number for each, and each is divided by their sum; equal unless given. Sums are fp32, in the order of
    `sources`, and rounded once. `values_from` says what is averaged: `weights`, or `master`, the fp32 masters in the optimizer
    state of Megatron checkpoints; masters unless given, where all have them. Layout, side files and settings are those of the
    first; optimizer state is left out. `hf_config` is a folder with the model's `config.json`, for Megatron checkpoints that do
    not say what model they hold.

    Raises UserError before a byte moves if they are of different models. After any failure nothing is at `target`.

    >>> average_checkpoints(["Llama-3.2-1B", "Llama-3.2-1B"], "averaged", weights=[1, 3]).command
    'average'
    """
    check_execution(options)
    if values_from is not None:
        check_values_from(values_from)
    if len(sources) < 2:
        raise UserError(f"{len(sources)} checkpoint cannot be averaged", hint="give two or more, then the target")
    reporter, target = reporter or Reporter(), expanded(target)
    roots = [open_source(source, or_hub=True) for source in sources]
    given = open_source(hf_config) if hf_config else None
    folders = [*roots, *([given] if given else [])]
    check_locations(target, folders, options)
    wanted = AverageOptions(weights=weights, values_from=values_from, hf_config=given, integrity=integrity)
    with ExitStack() as opened:
        readers = [opened.enter_context(closing(_open(root))) for root in roots]
        workers = workers_for(options.get("workers"), folders, target)
        conversion = _plan_average(readers, roots, wanted, reporter, workers)
        return execute(conversion, target, options=options, reporter=reporter, sources=folders)


@user_errors()
@seldom_collected()
def extend_vocab(
    source: str | Path,
    target: str | Path,
    *,
    to: int,
    init: str | Path = MEAN,
    hf_config: str | Path | None = None,
    weights_only: bool = False,
    integrity: bool = True,
    reporter: Reporter | None = None,
    **options: Unpack[ExecutionOptions],
) -> Summary:
    """Write a model with `to` tokens, more or fewer than it has: a Hugging Face directory or a Megatron checkpoint.

    A Megatron checkpoint keeps its layout. Rows of tokens are kept. New ones are `zero`, the `mean` of all tokens' rows, or in
    a safetensors file `init`: one tensor `[new tokens, hidden]` for all, or one under the Hugging Face name of each.
    `hf_config` is a folder with the model's `config.json`, for a Megatron checkpoint that does not say what model it holds.
    `weights_only` leaves out optimizer state, with which a source is refused otherwise.

    Raises UserError before a byte moves if the model cannot have so many tokens. After any failure nothing is at `target`.

    >>> extend_vocab("Llama-3.2-1B", "extended", to=128512).command
    'extend-vocab'
    """
    check_execution(options)
    check_options(dtype=KEEP, to=to)
    reporter, target, root = reporter or Reporter(), expanded(target), open_source(source, or_hub=True)
    given = open_source(hf_config) if hf_config else None
    rows = str(init) if init in (ZERO, MEAN) else _file(init)
    folders = [root, *([given] if given else [])]
    check_locations(target, folders, options)
    folders += [] if isinstance(rows, str) else [rows.folder]
    wanted = ExtendOptions(size=to, init=rows, hf_config=given, weights_only=weights_only, integrity=integrity)
    with closing(_open(root)) as reader:
        workers = workers_for(options.get("workers"), folders, target)
        if isinstance(reader, HuggingFaceReader):
            conversion = extend_model(reader, wanted, reporter, workers=workers)
        else:
            conversion = extend_megatron(reader, root, wanted, reporter, workers=workers)
        return execute(conversion, target, options=options, reporter=reporter, sources=folders)


def _file(path: str | Path) -> FileRef:
    """Return a file that the user named. Raises UserError where there is none."""
    file = Path(expanded(path))
    if not file.is_file():
        raise UserError(f"`{path}` is not `{ZERO}`, not `{MEAN}`, and no file", hint="`--init` takes one of these")
    return FileRef(LocalFolder(file.parent), file.name)


def _open(root: Folder) -> HuggingFaceReader | MegatronReader:
    refuse_adapter(root)
    reader = open_checkpoint(root, any_dtype=True)
    refuse_adapter(reader.folder)
    return reader


def _plan_average(
    readers: Sequence[HuggingFaceReader | MegatronReader],
    roots: Sequence[Folder],
    wanted: AverageOptions,
    reporter: Reporter,
    workers: int,
) -> Conversion:
    models = [reader for reader in readers if isinstance(reader, HuggingFaceReader)]
    checkpoints = [reader for reader in readers if not isinstance(reader, HuggingFaceReader)]
    if models and checkpoints:
        one, other = models[0].folder, checkpoints[0].folder
        raise UserError(
            f"`{one.label}` is {detect(one).value}, `{other.label}` is {detect(other).value}",
            hint="convert one of them first: checkpoints of one kind can be averaged",
        )
    if models:
        return average_models(models, wanted, reporter, workers=workers)
    return average_megatron(checkpoints, roots, wanted, reporter, workers=workers)
