"""Merge an adapter into the model it was trained beside, from the outside in: check, open, survey, plan, carry out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal, Unpack

from converter.adapters.adapter import Adapter
from converter.adapters.base import open_base
from converter.adapters.description import Base
from converter.adapters.files import refuse_adapter
from converter.adapters.fingerprint import fingerprint
from converter.adapters.fitting import survey
from converter.adapters.merged import MergedReader
from converter.adapters.open import open_either
from converter.checks import check_execution, check_locations, check_options
from converter.conversion import Conversion
from converter.execute import execute
from converter.execution import ExecutionOptions, Reporter, Summary
from converter.exporting import ExportOptions, plan_files
from converter.importing import ImportOptions, left_out, plan_import
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


@user_errors()
def merge(
    base: str | Path,
    adapter: str | Path,
    target: str | Path,
    *,
    to: Kind | None = None,
    hf_config: str | Path | None = None,
    any_base: bool = False,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    pp_layout: Sequence[int] | None = None,
    vocab_divisible_by: int = 128,
    integrity: bool = True,
    max_shard_size: int | None = None,
    dtype: str = KEEP,
    reporter: Reporter | None = None,
    **options: Unpack[ExecutionOptions],
) -> Summary:
    """Write a model with an adapter's changes added to its weights: in fp32, rounded once to each weight's dtype, or `dtype`.

    `base` is a Hugging Face directory, a URL, a Hub id or a Megatron checkpoint; `adapter` is PEFT's folder or a Megatron
    checkpoint of an adapter; `to` is the target's format, by default the base's. A Megatron target is laid out anew, by `tp`,
    `pp` and so on; a Hugging Face one keeps the base's files. An adapter that names its base is refused beside another,
    unless `any_base`. Raises UserError before a byte moves for whatever does not fit; after any failure nothing is at
    `target`.
    """
    check_execution(options)
    reporter, target = reporter or Reporter(), expanded(target)
    counts = {"tp": tp, "pp": pp, "vpp": vpp, "vocab_divisible_by": vocab_divisible_by, "max_shard_size": max_shard_size}
    check_options(dtype=dtype, **counts)
    folder, given = open_source(base, or_hub=True), open_source(hf_config) if hf_config else None
    layout = ImportOptions(
        tp=tp,
        pp=pp,
        vpp=vpp,
        pp_layout=pp_layout,
        dtype=dtype,
        vocab_divisible_by=vocab_divisible_by,
        integrity=integrity,
    )
    files = ExportOptions(hf_config=given, max_shard_size=max_shard_size, dtype=dtype, integrity=integrity)
    if to not in (None, "hf", "mcore"):
        raise UserError(f"the target's format `{to}` is not one of hf, mcore")
    refuse_adapter(folder)
    to = to or ("hf" if detect(folder) is not Format.TORCH_DIST else "mcore")
    _check_meant(to, layout, files)
    beside = open_source(adapter, or_hub=True)
    sources = [folder, beside, *([given] if given else [])]
    check_locations(target, sources, options)
    with closing(open_either(beside).adapter()) as opened:
        if not any_base:
            _check_base(folder, opened, reporter)
        model = open_base(folder, given)
        with closing(model.reader):
            found = survey(opened, model, beside)
            workers = workers_for(options.get("workers"), sources, target)
            source = replace(
                model,
                reader=MergedReader(model.reader, opened, dtype=dtype),
                adapter=found.told,
                memory=found.memory(workers),
            )
            conversion = _as_files(source, files, reporter) if to == "hf" else plan_import(source, layout, reporter)
            return execute(conversion, target, options=options, reporter=reporter, sources=sources)


def _check_meant(to: Kind, layout: ImportOptions, files: ExportOptions) -> None:
    """Raise UserError for an option that only the other format has."""
    if to == "hf":
        plain = {"tp": 1, "pp": 1, "vpp": 1, "pp_layout": None, "vocab_divisible_by": 128}
        given, what = {name: getattr(layout, name) for name in plain}, "a Hugging Face directory"
    else:
        plain, given, what = {"max_shard_size": None}, {"max_shard_size": files.max_shard_size}, "a Megatron checkpoint"
    meant = next((name for name in plain if given[name] != plain[name]), None)
    if meant:
        raise UserError(
            f"`{meant}` is {given[meant]}, which means nothing to {what}",
            hint="`--to hf` and `--to mcore` choose the target's format; without them it is the base's",
        )


def _check_base(folder: Folder, adapter: Adapter, reporter: Reporter) -> None:
    """Raise UserError if the adapter was trained beside another model; say so where it does not tell."""
    told = adapter.description.base
    if told is None or not told.fingerprint:
        reporter.note(f"the adapter does not tell its base apart from other models{_as_named(told)}: that is not checked")
        return
    found = fingerprint(folder)
    if found != told.fingerprint:
        raise UserError(
            f"the adapter was trained beside `{told.name}`, whose fingerprint is {told.fingerprint}; "
            f"that of `{folder.label}` is {found}",
            hint="give the base it was trained beside, or `--any-base` to merge it into this one",
        )


def _as_named(base: Base | None) -> str:
    return f" (it names `{base.name}`)" if base and base.name else ""


def _as_files(source: Source, wanted: ExportOptions, reporter: Reporter) -> Conversion:
    """The same tensors, in the base's files where they are known."""
    tensor_plans = [_kept(spec, wanted.dtype) for spec in source.reader.specs.values()]
    for text in (*left_out(source), *(f"weights are cast from {old} to {new}" for old, new in casts(tensor_plans).items())):
        reporter.note(text)
    return plan_files(source, tensor_plans, wanted, reporter)


def _kept(spec: TensorSpec, dtype: str) -> TensorPlan:
    """A tensor as it is, or cast."""
    target = TensorSpec(spec.name, spec.shape, target_dtype(spec, dtype))
    return same_tensor(target, spec)
