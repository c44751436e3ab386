"""Merge an adapter into its base model, from the outside in: check, open, survey, plan, execute."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Literal, Unpack, cast, get_args

from converter.adapter_files import is_peft, refuse_adapter, require
from converter.adapters.adapter import AdapterReader, Base
from converter.adapters.base import open_base, stacks_of, survey, under_names_of
from converter.adapters.fingerprint import fingerprint
from converter.adapters.megatron import open_megatron_adapter
from converter.adapters.merged import BLOCK_BYTES, RECENT, MergedReader
from converter.adapters.peft import open_peft_adapter
from converter.checks import check_execution, check_layout, check_locations, check_options
from converter.conversion import Conversion
from converter.execute import execute
from converter.execution import ExecutionOptions, Reporter, Summary
from converter.exporting import ExportOptions, plan_files
from converter.importing import ImportOptions, left_out, plan_import
from converter.keywords import IN_MEGATRON, other_names
from converter.plan import TensorPlan, casts, same_tensor
from converter.sources import Source, open_source, workers_for
from converter.values import KEEP, target_dtype
from formats.detect import Format, detect
from formats.disk import user_errors
from formats.errors import UserError
from formats.folder import Folder
from formats.home import expanded
from formats.spec import TensorSpec

Kind = Literal["hf", "mcore"]


@other_names(any_base="allow_other_base", vocab_divisible_by="make_vocab_size_divisible_by", **IN_MEGATRON)
@user_errors()
def merge(
    base: str | Path,
    adapter: str | Path,
    target: str | Path,
    *,
    to: Kind | None = None,
    hf_config: str | Path | None = None,
    allow_other_base: bool = False,
    layout: str | None = None,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    pp_layout: str | Sequence[int] | None = None,
    ep: int = 1,
    etp: int | None = None,
    make_vocab_size_divisible_by: int = 128,
    integrity: bool = True,
    max_shard_size: int | None = None,
    dtype: str = KEEP,
    reporter: Reporter | None = None,
    **options: Unpack[ExecutionOptions],
) -> Summary:
    """Write a model with an adapter's changes added to its weights: in fp32, rounded once to each weight's dtype, or `dtype`.

    `base` is a Hugging Face directory, a URL, a Hub id or a Megatron checkpoint; `adapter` is PEFT's folder or a Megatron
    checkpoint of an adapter; `to` is the target's format, by default the base's. A Megatron target is laid out anew, by `tp`,
    `pp` and so on, and by `layout`, which is the base's by default; a Hugging Face one keeps the base's files. An adapter that
    names its base is refused with another base, unless `allow_other_base`. Raises UserError before a byte moves if the adapter
    does not fit. After any failure nothing is at `target`.

    >>> merge("Llama-3.2-1B", "adapter", "merged").tensors
    39
    """
    check_execution(options)
    check_layout(layout)
    check_options(dtype=dtype, tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp,
                  make_vocab_size_divisible_by=make_vocab_size_divisible_by, max_shard_size=max_shard_size)  # fmt: skip
    wanted = ImportOptions(layout=layout, tp=tp, pp=pp, vpp=vpp, pp_layout=pp_layout, ep=ep, etp=etp,
                           dtype=dtype, make_vocab_size_divisible_by=make_vocab_size_divisible_by,
                           integrity=integrity)  # fmt: skip
    given = open_source(hf_config) if hf_config else None
    files = ExportOptions(hf_config=given, max_shard_size=max_shard_size, dtype=dtype, integrity=integrity)
    folder, reporter = open_source(base, or_hub=True), reporter or Reporter()
    outputs = _Target(expanded(target), _choose_format(to, folder), wanted, files, allow_other_base)
    return _execute(folder, open_source(adapter, or_hub=True), outputs, options, reporter)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a merged model is written, in which format, the options of both formats, and whether any base may be merged into."""

    path: str
    kind: Kind
    layout: ImportOptions
    files: ExportOptions
    allow_other_base: bool


def _execute(base: Folder, adapter: Folder, target: _Target, options: ExecutionOptions, reporter: Reporter) -> Summary:
    layout, files = target.layout, target.files
    _check_format_options(target.kind, layout, files)
    sources = [base, adapter, *([files.hf_config] if files.hf_config else [])]
    check_locations(target.path, sources, options)
    with closing(open_adapter(adapter)) as opened:
        if not target.allow_other_base:
            _check_base(base, opened.description.base, reporter, given=files.hf_config)
        workers = workers_for(options.get("workers"), sources, target.path)
        with _merged(open_base(base, files.hf_config), opened, adapter, dtype=files.dtype, workers=workers) as source:
            conversion = _plan_files(source, files, reporter) if target.kind == "hf" else plan_import(source, layout, reporter)
            return execute(conversion, target.path, options=options, reporter=reporter, sources=sources)


def open_adapter(folder: Folder) -> AdapterReader:
    """Open an adapter: PEFT's folder, or a Megatron checkpoint, its root or one iteration. Reads headers only.

    Raises UserError for a folder that is neither, is damaged, or holds an adapter of an unknown method.
    """
    if is_peft(folder):
        return open_peft_adapter(folder).adapter
    require(folder, Format.TORCH_DIST, adapter=True)
    return open_megatron_adapter(folder).adapter


def _choose_format(to: str | None, base: Folder) -> Kind:
    """Return the target's format: `to`, or by default the base's. Raises UserError for another word, and for a base that is an
    adapter."""
    if to not in (None, *get_args(Kind)):
        raise UserError(f"the target's format `{to}` is not one of {', '.join(get_args(Kind))}")
    refuse_adapter(base)
    return cast("Kind", to) if to else ("mcore" if detect(base).is_megatron else "hf")


def _check_format_options(kind: Kind, layout: ImportOptions, files: ExportOptions) -> None:
    """Raise UserError for an option that only the other format has. `hf_config` is the base's, whatever the target."""
    given, own, what = (layout, files, "a Hugging Face directory") if kind == "hf" else (files, layout, "a Megatron checkpoint")
    shared, parameters = {"hf_config", *(field.name for field in fields(own))}, signature(merge).parameters
    for name in [field.name for field in fields(given) if field.name in parameters and field.name not in shared]:
        if getattr(given, name) != parameters[name].default:
            raise UserError(
                f"`{name}` is {getattr(given, name)}, which has no effect if the target is {what}",
                hint="`--to hf` and `--to mcore` choose the target's format; without them it is the base's",
            )


def _check_base(folder: Folder, expected: Base | None, reporter: Reporter, *, given: Folder | None) -> None:
    """Raise UserError if the adapter was trained on another model; report if it has no fingerprint to compare."""
    if expected is None or not expected.fingerprint:
        named = f" (it names `{expected.name}`)" if expected and expected.name else ""
        reporter.note(f"the adapter has no fingerprint of its base{named}: whether it was trained on this one is not checked")
        return
    actual = fingerprint(folder, given=given)
    if actual != expected.fingerprint:
        raise UserError(
            f"the adapter was trained on `{expected.name}`, whose fingerprint is {expected.fingerprint}; "
            f"that of `{folder.label}` is {actual}",
            hint="give the base it was trained on, or `--allow-other-base` to merge it into this one",
        )


@contextmanager
def _merged(model: Source, adapter: AdapterReader, folder: Folder, *, dtype: str, workers: int) -> Generator[Source]:
    """Yield the base with the adapter's changes added when it is read, and close it. `folder`: the adapter's."""
    with closing(model.reader):
        adapter, stacks = under_names_of(model, adapter), stacks_of(model)
        result = survey(adapter, model, folder, stacks)
        reader = MergedReader(model.reader, adapter.read_delta, changed=adapter.parts.keys(), stacks=stacks, dtype=dtype)
        yield replace(
            model, reader=reader, adapter=result.provenance, memory=model.memory + _memory(result.nbytes, workers=workers)
        )


def _memory(nbytes: Mapping[str, int], *, workers: int) -> int:
    """Return the most bytes that merging holds: the largest cached deltas, and two blocks for each worker."""
    return sum(sorted(nbytes.values())[-RECENT:]) + workers * 2 * BLOCK_BYTES


def _plan_files(source: Source, wanted: ExportOptions, reporter: Reporter) -> Conversion:
    """Plan the same tensors, in the base's files if they are known."""
    tensor_plans = [_cast(spec, wanted.dtype) for spec in source.reader.specs.values()]
    for text in (*left_out(source), *(f"weights are cast from {old} to {new}" for old, new in casts(tensor_plans).items())):
        reporter.note(text)
    return plan_files(source, tensor_plans, wanted, reporter)


def _cast(spec: TensorSpec, dtype: str) -> TensorPlan:
    """Plan a tensor as it is, or cast."""
    return same_tensor(TensorSpec(spec.name, spec.shape, target_dtype(spec, dtype)), spec)
