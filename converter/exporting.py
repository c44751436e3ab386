"""From a Megatron checkpoint, or a model seen as Hugging Face has it, to everything that writing it as a Hugging Face directory
does: what is made, which file holds it, and what lies beside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from converter import families, provenance, reference
from converter.comparison import CheckpointView
from converter.config import make_model
from converter.conversion_plan import ConversionPlan, Reporter, manifest, outputs_for
from converter.families import Family
from converter.model import Model
from converter.plan import TensorPlan, as_stored, casts
from converter.planner import to_huggingface
from converter.quantization import is_plain, quantization
from converter.run import check_filled
from converter.side_files import CONFIG, EXTRAS, HEADERS, HFReference
from converter.sources import Source
from converter.views import with_side_files
from formats.dcp_index import METADATA
from formats.errors import format_untrusted
from formats.folder import FileRef, Folder
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter, Shard, make_index, plan_shards, retyped, specs_of
from formats.megatron_reader import MegatronReader
from formats.shard_files import INDEX
from formats.spec import JoinedReader, Reader, TensorSpec, names_of

DEFAULT_SHARD_BYTES = 5_000_000_000
"""What transformers' `save_pretrained` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What the bytes of an export depend on beside its source."""

    hf_config: Folder | None
    max_shard_size: int | None
    dtype: str
    integrity: bool


def plan_export(reader: MegatronReader, root: Folder, target: str, wanted: ExportOptions, reporter: Reporter) -> ConversionPlan:
    """Everything an export does. Raises UserError for whatever cannot be converted exactly."""
    reader.check()  # first: the index is let go of, and what follows takes its room
    origin = reference.find(reader, wanted.hf_config)
    family = families.find(origin.config.get("model_type")).rooted(specs_of(origin.shards))
    model = make_model(family.CONFIG, origin.config)
    tensor_plans, extras = _makings(reader, family, model, origin, dtype=wanted.dtype)
    tensors = JoinedReader(reader, *extras) if extras else reader
    return plan_files(megatron_source(reader, root, origin, tensors), tensor_plans, target, wanted, reporter)


def _makings(
    reader: MegatronReader, family: Family, model: Model, origin: HFReference, *, dtype: str
) -> tuple[list[TensorPlan], list[HuggingFaceReader]]:
    """What is made of a checkpoint that was found whole, and the readers of what it carries beside Megatron's tensors."""
    plan = to_huggingface(family.RULES, model, reader.specs, dtype=dtype, known=specs_of(origin.shards))
    for name, value in plan.filled.items():
        check_filled(reader, name, value)
    return with_side_files(plan.tensors, family, model, origin)


def megatron_source(reader: MegatronReader, root: Folder, origin: HFReference, tensors: Reader) -> Source:
    """A checkpoint as a model to convert, its `tensors` read as they lie there or in another way."""
    read = [*reader.files, METADATA, *(f"{HEADERS}/{name}" for name in origin.shards)]
    read += [EXTRAS] if origin.extras else []
    return Source(
        label=reader.folder.label,
        reader=tensors,
        reference=origin,
        files={name: FileRef(reader.folder, name) for name in sorted(read) if reader.folder.has(name)},
        told=provenance.megatron_source(root, reader.folder),
    )


def plan_files(
    source: Source, tensor_plans: Sequence[TensorPlan], target: str, wanted: ExportOptions, reporter: Reporter
) -> ConversionPlan:
    """Everything that writing a directory of these tensors does."""
    shards = choose_shards(tensor_plans, source.reference, wanted.max_shard_size)
    made, texts = documents(source.reference, shards, limited=wanted.max_shard_size is not None)
    for text in (*source.reference.notes, *texts):
        reporter.note(text)
    return _job(_Planned(source, in_file_order(tensor_plans, shards), shards, made), target, wanted)


@dataclass(frozen=True, slots=True)
class _Planned:
    """A source read as a model, and the files to make of it."""

    source: Source
    tensor_plans: Sequence[TensorPlan]
    shards: Mapping[str, Shard]
    documents: Mapping[str, bytes]


def _job(found: _Planned, target: str, wanted: ExportOptions) -> ConversionPlan:
    source, given = found.source, wanted.hf_config.name if wanted.hf_config else None
    command = source.command("mcore-to-hf")
    options = {"max_shard_size": wanted.max_shard_size, "dtype": wanted.dtype, "hf_config": given}
    options |= {} if wanted.integrity else {"integrity": False}  # as earlier versions wrote it, where it says nothing new
    laid_out = {file: shard.size for file, shard in found.shards.items()}
    outputs = outputs_for(target, found.tensor_plans, {**options, **source.merged(), "shards": laid_out})
    made = {*found.documents, provenance.FILE}
    copies = {name: file for name, file in source.reference.files.items() if name not in made}
    return ConversionPlan(
        command=command,
        source=source.label,
        target=target,
        reader=source.reader,
        writer=HuggingFaceWriter(outputs, found.shards),
        outputs=outputs,
        tensor_plans=found.tensor_plans,
        manifest=manifest(command, {**options, **source.merged()}, {**source.files, **copies}),
        provenance_fields={
            "source": source.told,
            **source.merged(),
            "options": options,
            "family": source.reference.config.get("model_type"),
            "casts": casts(found.tensor_plans),
            "tensors": {"in": len(source.reader.specs), "out": len(found.tensor_plans)},
        },
        tensors={tensor_plan.spec.name: tensor_plan.spec for tensor_plan in found.tensor_plans},
        passing="made",
        views=lambda written: (_read(found), _written(written)),
        copies=copies,
        documents=found.documents,
        hashed=wanted.integrity,
        last=(INDEX, CONFIG),
        memory=source.memory,
    )


def _read(found: _Planned) -> CheckpointView:
    return CheckpointView(
        found.source.label, found.source.reader, {tensor_plan.spec.name: tensor_plan for tensor_plan in found.tensor_plans}
    )


def _written(folder: Folder) -> CheckpointView:
    reader = HuggingFaceReader(folder)
    return CheckpointView(folder.label, reader, as_stored(reader.specs))


def choose_shards(tensor_plans: Sequence[TensorPlan], origin: HFReference, limit: int | None) -> dict[str, Shard]:
    """The files to write: those that travelled if they hold just these names and shapes, else files of at most `limit`."""
    specs = {tensor_plan.spec.name: tensor_plan.spec for tensor_plan in tensor_plans}
    if limit is None and _same_shapes(origin.shards, specs):
        return {file: retyped(shard, specs, source=file) for file, shard in origin.shards.items()}
    return plan_shards([tensor_plan.spec for tensor_plan in tensor_plans], limit=limit or DEFAULT_SHARD_BYTES)


def _same_shapes(shards: Mapping[str, Shard], specs: Mapping[str, TensorSpec]) -> bool:
    """Are these the tensors of the files, but for their dtypes?"""
    held = [shard.tensors for shard in shards.values()]
    return sum(map(len, held)) == len(specs) and all(
        name in specs and specs[name].shape == spec.shape for tensors in held for name, spec in tensors.items()
    )


def in_file_order(tensor_plans: Sequence[TensorPlan], shards: Mapping[str, Shard]) -> list[TensorPlan]:
    """Makings in the order in which their data lies in the files, so that each file is written front to back."""
    made = {tensor_plan.spec.name: tensor_plan for tensor_plan in tensor_plans}
    return [made[name] for shard in shards.values() for name in shard.tensors]


def documents(origin: HFReference, shards: Mapping[str, Shard], *, limited: bool) -> tuple[dict[str, bytes], list[str]]:
    """Documents that are not copied as they travelled, and notes on why: the index of other files, a `config.json` whose
    dtype changed or that was rebuilt."""
    made: dict[str, bytes] = {}
    notes: list[str] = []
    changed = dict(shards) != dict(origin.shards)
    if changed and origin.shards and not limited and not _same_shapes(origin.shards, specs_of(shards)):
        notes.append("the shard map that travelled is of other tensors than these: files are divided anew")
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
    """`config.json` with the dtype of the weights written, if that is not what the files it belongs to have; without a
    quantization that they do not have."""
    dtypes = {spec.dtype for shard in shards.values() for spec in shard.tensors.values()}
    left_over = quantization(origin.config) if is_plain(dtypes) else ()
    config, dtype = {name: value for name, value in origin.config.items() if name not in left_over}, _main_dtype(shards)
    if origin.shards and _main_dtype(origin.shards) == dtype:
        return config
    return config | dict.fromkeys(_dtype_fields(config), names_of(dtype).torch)


def _dtype_fields(config: Mapping[str, Any]) -> list[str]:
    """transformers 4 wrote `torch_dtype`, 5 writes `dtype`."""
    return [name for name in ("torch_dtype", "dtype") if name in config] or ["dtype"]


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """What is otherwise in `config.json` than where it is from, in words."""
    for name, value in after.items():
        if name not in before or before[name] != value:
            yield f"`{name}` from `{format_untrusted(before.get(name))}` to `{value}`"
    for name in before:
        if name not in after:
            yield f"without `{name}`, for the weights are not quantized"


def _main_dtype(shards: Mapping[str, Shard]) -> np.dtype[Any]:
    """The dtype most bytes have."""
    sizes: dict[np.dtype[Any], int] = {}
    for shard in shards.values():
        for spec in shard.tensors.values():
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])
