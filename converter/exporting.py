"""Plan an export: from a Megatron checkpoint to the tensors, files and provenance of a Hugging Face directory.

`plan_files` is the second half, for any model whose tensors have Hugging Face names: a merge uses it too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from converter import families, provenance, reference
from converter.checks import check_filled
from converter.comparison import CheckpointView
from converter.config import make_model
from converter.conversion import Conversion
from converter.conversion_plan import ConversionPlan, OutputFiles, manifest, sizes_of
from converter.encoding import encode, quantized_source
from converter.execution import Reporter
from converter.hybrid import layout_of
from converter.master_reader import WORKER_BYTES, reader_of
from converter.originals import original_names, with_originals
from converter.plan import TensorPlan, as_stored, casts, casts_of_kept
from converter.planner import to_huggingface
from converter.provenance import Provenance
from converter.quantization import is_plain, quantization, without_quantization
from converter.requantizing import requantize, rounding
from converter.side_files import CONFIG, HFReference
from converter.sources import Source, megatron_source
from converter.values import KEEP, MASTERS, WEIGHTS, dtype_of_most_bytes
from converter.views import with_side_files
from converter.workers import DEFAULT
from formats.errors import format_untrusted
from formats.folder import FileRef, Folder
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter, Shard, make_index, plan_shards, retyped, specs_of
from formats.megatron_reader import MegatronReader
from formats.quantized import encoded, requantized
from formats.shard_files import INDEX
from formats.spec import JoinedReader, TensorSpec, names_of

DEFAULT_SHARD_BYTES = 5_000_000_000
"""What transformers' `save_pretrained` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The options that the bytes of an export depend on."""

    hf_config: Folder | None
    max_shard_size: int | None
    dtype: str
    integrity: bool
    quantize: str = ""
    """The method by which weights are quantized anew; none if empty."""

    values_from: str = WEIGHTS
    """Whether the values are those of the weights, or of their fp32 masters (see `converter.master_reader`)."""


def plan_export(
    reader: MegatronReader, root: Folder, wanted: ExportOptions, reporter: Reporter, *, workers: int = DEFAULT
) -> Conversion:
    """Return the conversion of a Megatron checkpoint to Hugging Face. Raises UserError if it cannot be converted exactly."""
    reader.check()  # first: it frees the index, whose memory the plan then takes
    reader = reader_of(reader, wanted.values_from)
    origin = reference.find(reader, wanted.hf_config)
    family = families.find(origin.config.get("model_type"), layout_of(reader.specs)).rooted(specs_of(origin.shards))
    model = make_model(family.CONFIG, origin.config)
    plan = to_huggingface(family.RULES, model, reader.specs, dtype=wanted.dtype, known=specs_of(origin.shards))
    for name, value in plan.filled.items():
        check_filled(reader, name, value)
    for text in (*casts_of_kept(plan.kept), *_left_behind(reader)):
        reporter.note(text)
    quantized = quantized_source(origin)
    side_tensors = {*quantized.names, *original_names(family.RULES, model)}
    tensor_plans, extras = with_side_files(plan.tensors, family, model, origin, side_tensors=side_tensors)
    tensor_plans, tensors = with_originals(tensor_plans, JoinedReader(reader, *extras) if extras else reader)
    if wanted.quantize:
        tensor_plans, tensors, origin, new = requantize(tensor_plans, tensors, quantized.weights, origin, wanted.quantize)
        conversion = plan_files(megatron_source(reader, root, origin, tensors), tensor_plans, wanted, reporter)
        memory = conversion.memory + workers * requantized.WORKER_BYTES
        return replace(conversion, done=lambda: rounding(new.error), memory=memory)
    if quantized.weights and wanted.dtype == KEEP:
        tensor_plans, tensors, text = encode(tensor_plans, tensors, quantized, reader.folder, workers=workers)
        reporter.note(text)
    conversion = plan_files(megatron_source(reader, root, origin, tensors), tensor_plans, wanted, reporter)
    each = (encoded.WORKER_BYTES if quantized.weights else 0) + (WORKER_BYTES if wanted.values_from == MASTERS else 0)
    return replace(conversion, memory=conversion.memory + workers * each)


def _left_behind(reader: MegatronReader) -> Iterator[str]:
    """Yield a note if the checkpoint holds more of a training run than its weights."""
    if reader.has_optimizer:
        yield f"optimizer state is not exported: to continue training, keep `{reader.folder.label}`"


def plan_files(source: Source, tensor_plans: Sequence[TensorPlan], wanted: ExportOptions, reporter: Reporter) -> Conversion:
    """Return the conversion of a source to a directory of these tensors, in the source's files where they are known."""
    shards = choose_shards(tensor_plans, source.reference, wanted.max_shard_size)
    made, texts = documents(source.reference, shards, limited=wanted.max_shard_size is not None)
    for text in (*source.reference.notes, *texts):
        reporter.note(text)
    replaced = {*made, provenance.FILE}
    copies = {name: file for name, file in source.reference.files.items() if name not in replaced}
    export = _Export(source, in_file_order(tensor_plans, shards), shards, made, copies)
    return Conversion(
        plan=_conversion_plan(export, wanted),
        reader=source.reader,
        views=lambda written: _views(export, written),
        copies=copies,
        memory=source.memory,
    )


class _Export(NamedTuple):
    """A source, and the files that are made of it."""

    source: Source
    tensor_plans: Sequence[TensorPlan]
    shards: Mapping[str, Shard]
    documents: Mapping[str, bytes]
    copies: Mapping[str, FileRef]


def _conversion_plan(export: _Export, wanted: ExportOptions) -> ConversionPlan:
    source, given = export.source, wanted.hf_config.name if wanted.hf_config else None
    command = source.command("mcore-to-hf")
    options = {"max_shard_size": wanted.max_shard_size, "dtype": wanted.dtype, "hf_config": given}
    options |= {"quantize": wanted.quantize} if wanted.quantize else {}
    options |= {"from": wanted.values_from} if wanted.values_from != WEIGHTS else {}
    options |= {} if wanted.integrity else {"integrity": False}  # as earlier versions wrote it, where it says nothing new
    shard_sizes = {file: shard.size for file, shard in export.shards.items()}
    return ConversionPlan(
        source=source.label,
        tensor_plans=export.tensor_plans,
        output=OutputFiles(
            writer=HuggingFaceWriter(export.shards),
            documents=export.documents,
            copied=sizes_of(export.copies),
            last=(INDEX, CONFIG),
        ),
        provenance=Provenance(
            command=command,
            fields={"source": source.provenance, **source.merged(), "options": options, **_fields(export)},
            tensors={tensor_plan.spec.name: tensor_plan.spec for tensor_plan in export.tensor_plans},
            passing="made",
            hashed=wanted.integrity,
        ),
        manifest=manifest(command, {**options, **source.merged()}, {**source.files, **export.copies}),
        identity={**options, **source.merged(), "shards": shard_sizes},
    )


def _fields(export: _Export) -> dict[str, Any]:
    """Return what `conversion.json` says of an export beside its source and its options."""
    return {
        "family": export.source.reference.config.get("model_type"),
        "casts": casts(export.tensor_plans),
        "tensors": {"in": len(export.source.reader.specs), "out": len(export.tensor_plans)},
    }


def _views(export: _Export, written: Folder) -> tuple[CheckpointView, CheckpointView]:
    """Return the source as it is converted, and the written output."""
    tensor_plans = {tensor_plan.spec.name: tensor_plan for tensor_plan in export.tensor_plans}
    reader = HuggingFaceReader(written, any_dtype=True)
    source = CheckpointView(export.source.label, export.source.reader, tensor_plans)
    return source, CheckpointView(written.label, reader, as_stored(reader.specs))


def choose_shards(tensor_plans: Sequence[TensorPlan], origin: HFReference, limit: int | None) -> dict[str, Shard]:
    """Return the files to write: the source's own if they hold just these names and shapes, else files of at most `limit`
    bytes."""
    specs = {tensor_plan.spec.name: tensor_plan.spec for tensor_plan in tensor_plans}
    if limit is None and _same_shapes(origin.shards, specs):
        return {file: retyped(shard, specs) for file, shard in origin.shards.items()}
    return plan_shards([tensor_plan.spec for tensor_plan in tensor_plans], limit=limit or DEFAULT_SHARD_BYTES)


def _same_shapes(shards: Mapping[str, Shard], specs: Mapping[str, TensorSpec]) -> bool:
    """Return whether the files hold these tensors, but for their dtypes."""
    held = [shard.tensors for shard in shards.values()]
    return sum(map(len, held)) == len(specs) and all(
        name in specs and specs[name].shape == spec.shape for tensors in held for name, spec in tensors.items()
    )


def in_file_order(tensor_plans: Sequence[TensorPlan], shards: Mapping[str, Shard]) -> list[TensorPlan]:
    """Return tensors in the order of their data in the files, so that each file is written front to back."""
    made = {tensor_plan.spec.name: tensor_plan for tensor_plan in tensor_plans}
    return [made[name] for shard in shards.values() for name in shard.tensors]


def documents(origin: HFReference, shards: Mapping[str, Shard], *, limited: bool) -> tuple[dict[str, bytes], list[str]]:
    """Return the documents that are not copied from the source, and notes on why: the index of other files, a `config.json`
    whose dtype changed or that was rebuilt."""
    made: dict[str, bytes] = {}
    notes: list[str] = []
    changed = dict(shards) != dict(origin.shards)
    if changed and origin.shards and not limited and not _same_shapes(origin.shards, specs_of(shards)):
        notes.append("the checkpoint's shard map is of other tensors: files are divided anew")
    if changed and (len(shards) > 1 or INDEX in origin.files):
        made[INDEX] = make_index(shards)
    config = _retyped_config(origin, shards)
    if config != origin.config or CONFIG not in origin.files:
        made[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
        if CONFIG not in origin.files:
            notes.append(f"`{CONFIG}` is {origin.origin}")
        notes += [f"`{CONFIG}` changed: {text}" for text in _changes(origin.config, config)]
    return made, notes


def _retyped_config(origin: HFReference, shards: Mapping[str, Shard]) -> dict[str, Any]:
    """Return `config.json` with the dtype of the weights written, if the source's files have another; without a quantization
    that they do not have."""
    dtypes = {spec.dtype for shard in shards.values() for spec in shard.tensors.values()}
    config = without_quantization(origin.config) if is_plain(dtypes) else dict(origin.config)
    specs = specs_of(shards).values()
    plain = [spec for spec in specs if is_plain({spec.dtype})] if quantization(config) else []  # whose dtype codes stand for
    dtype = dtype_of_most_bytes(plain or specs)
    if origin.shards and dtype_of_most_bytes(specs_of(origin.shards).values()) == dtype:
        return config
    return config | dict.fromkeys(_dtype_fields(config), names_of(dtype).torch)


def _dtype_fields(config: Mapping[str, Any]) -> list[str]:
    """Return the fields for the dtype: transformers 4 wrote `torch_dtype`, 5 writes `dtype`."""
    return [name for name in ("torch_dtype", "dtype") if name in config] or ["dtype"]


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences between two versions of `config.json`, in words."""
    dropped = quantization(before).keys() - quantization(after).keys()
    before = without_quantization(before) if dropped else before
    for name, value in after.items():
        if name not in before or before[name] != value:
            yield f"`{name}` from `{format_untrusted(before.get(name))}` to `{value}`"
    for name in sorted(dropped):
        yield f"without `{name}`, for the weights are not quantized"
