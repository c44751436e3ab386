"""From a model as Hugging Face has it to everything an import does: what it makes, what lies beside, and what it tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from math import prod
from typing import Any

import numpy as np

from converter import families, provenance, reference, run_config, side_files
from converter.comparison import CheckpointView
from converter.config import BUILT_IN_ROPE, make_model, rope_numbers, to_megatron
from converter.conversion_plan import ConversionPlan, Reporter, manifest, outputs_for
from converter.extra_states import stateful_module
from converter.families import Family
from converter.layout import Layout, make_layout
from converter.model import Model
from converter.plan import as_stored, casts
from converter.planner import Plan, sharded
from converter.planner import to_megatron as plan_megatron
from converter.quantization import is_plain, quantization
from converter.recognize import refuse_unfit
from converter.run import check_equal, check_exact
from converter.side_files import SideFiles
from converter.sources import Source
from converter.values import KEEP
from converter.views import megatron_view, tied
from formats.dcp_index import METADATA
from formats.detect import open_megatron
from formats.errors import UserError
from formats.folder import FileRef, Folder
from formats.huggingface import HuggingFaceReader
from formats.iterations import iteration_folder
from formats.outputs import Outputs
from formats.spec import is_valid_shape
from formats.torch_dist_writer import ShardedTensor, TorchDistWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What the bytes of an import depend on beside its source."""

    tp: int
    pp: int
    vpp: int
    pp_layout: Sequence[int] | None
    ep: int = 1
    etp: int | None = None
    """The shards of each expert; as many as of other layers (`tp`) unless given."""

    dtype: str
    make_vocab_size_divisible_by: int
    integrity: bool


@dataclass(frozen=True, slots=True)
class _Planned:
    """A source read as a model, and the plan for it."""

    source: Source
    family: Family
    model: Model
    layout: Layout
    plan: Plan
    side_files: SideFiles


def huggingface_source(reader: HuggingFaceReader) -> Source:
    """A Hugging Face directory as a model to convert."""
    reference, left_out = side_files.of_model(reader)
    return Source(
        label=reader.folder.label,
        reader=reader,
        reference=reference,
        files={name: FileRef(reader.folder, name) for name in reader.shards},
        told=provenance.huggingface_source(reader.folder, reader.shards),
        left_out=left_out,
    )


def plan_import(source: Source, target: str, wanted: ImportOptions, reporter: Reporter) -> ConversionPlan:
    """Everything an import does. Raises UserError for whatever cannot be converted exactly."""
    found = _planned(source, wanted)
    for text in notes(source, found.plan):
        reporter.note(text)
    for name, other in found.plan.equal:
        check_equal(source.reader, name, other)
    for tensor_plan in found.plan.exact:
        check_exact(source.reader, tensor_plan)
    return _job(found, target, wanted)


def _planned(source: Source, wanted: ImportOptions) -> _Planned:
    reader, config = source.reader, source.reference.config
    family = families.find(config.get("model_type")).rooted(reader.specs)
    model = make_model(family.CONFIG, config, vocab_multiple=wanted.make_vocab_size_divisible_by * wanted.tp)
    refuse_unfit(reader.specs, config, family, model, label=source.label)
    _check_padding(model, wanted)
    layout = make_layout(
        model, tp=wanted.tp, pp=wanted.pp, vpp=wanted.vpp, pp_layout=wanted.pp_layout, ep=wanted.ep, etp=wanted.etp
    )
    passing = family.PASSTHROUGH_PREFIXES
    plan = plan_megatron(family.RULES, family.EXTRAS, model, reader.specs, dtype=wanted.dtype, passing=passing)
    return _Planned(source, family, model, layout, plan, side_files.collect_model(source.reference, reader, plan.extras))


def _job(found: _Planned, target: str, wanted: ImportOptions) -> ConversionPlan:
    source, plan, side_files = found.source, found.plan, found.side_files
    command, options = source.command("hf-to-mcore"), _options(wanted, found.layout, experts="experts" in found.model)
    outputs = outputs_for(target, plan.tensors, {**options, **source.merged()})
    folder = f"{iteration_folder(0)}/"
    documents = {**side_files.documents, **_documents(found, vocab_multiple=wanted.make_vocab_size_divisible_by)}
    return ConversionPlan(
        command=command,
        source=source.label,
        target=target,
        reader=source.reader,
        writer=_writer(outputs, found),
        outputs=outputs,
        tensor_plans=plan.tensors,
        manifest=manifest(command, {**options, **source.merged()}, {**source.files, **side_files.copies}),
        provenance_fields={"source": source.told, **source.merged(), "options": options, **_facts(found)},
        tensors=source.reader.specs,
        passing="read",
        views=lambda written: _sides(found, written, wanted.dtype),
        hashes=side_files.hashes,
        aliases=dict(plan.equal),
        copies={f"{folder}{name}": file for name, file in side_files.copies.items()},
        documents={f"{folder}{name}": data for name, data in documents.items()},
        folder=folder,
        last=(f"{folder}{METADATA}",),
        integrity=wanted.integrity,
        hashed=wanted.integrity,
        memory=source.memory,
    )


def _writer(outputs: Outputs, found: _Planned) -> TorchDistWriter:
    return TorchDistWriter(
        outputs,
        starmap(ShardedTensor, sharded(found.plan, found.layout)),
        stacked=found.model.get("stacked", True),
        stateful_module=partial(stateful_module, hybrid=found.model.get("hybrid", False)),
    )


def _check_padding(model: Model, wanted: ImportOptions) -> None:
    """Raise UserError for a padded vocabulary of more rows than a tensor can have."""
    if not is_valid_shape((model.padded_vocab, model.hidden)):
        raise UserError(
            f"`--make-vocab-size-divisible-by {wanted.make_vocab_size_divisible_by}` and `--tp {wanted.tp}` pad the vocabulary "
            f"of {model.vocab} to {model.padded_vocab} rows of {model.hidden}, which is more than a tensor can hold",
            hint="Megatron-LM's default is 128",
        )


def _options(wanted: ImportOptions, layout: Layout, *, experts: bool) -> dict[str, Any]:
    return {
        "tp": wanted.tp,
        "pp": wanted.pp,
        "vpp": wanted.vpp,
        "layers": list(layout.stages),
        "dtype": wanted.dtype,
        "vocab_divisible_by": wanted.make_vocab_size_divisible_by,
        "integrity": wanted.integrity,
        **({"ep": layout.ep, "etp": layout.etp} if experts else {}),
    }


def _sides(found: _Planned, written: Folder, dtype: str) -> tuple[CheckpointView, CheckpointView]:
    """The source, and what an export of the written output would give; padding must be zero there."""
    back = open_megatron(written)
    tensor_plans = as_stored(found.source.reader.specs)
    tied_too = tied(tensor_plans.values(), found.family, found.model)
    one = CheckpointView(found.source.label, found.source.reader, tensor_plans, tied=tied_too)
    other = megatron_view(back, reference.find(back, None), zero=_padding(found.plan, found.model))
    return (one, other) if dtype == KEEP else (one.cast(dtype), other.cast(dtype))


def _padding(plan: Plan, model: Model) -> dict[str, int]:
    """Tensors whose rows from some number on are padding."""
    made = zip(plan.bound_rules, plan.tensors, strict=True)
    return {tensor_plan.spec.name: model.vocab for (rule, _), tensor_plan in made if rule.padded and tensor_plan.parts}


def _documents(found: _Planned, *, vocab_multiple: int) -> dict[str, bytes]:
    megatron = to_megatron(found.family.CONFIG, found.source.reference.config)
    made = run_config.make(megatron, found.layout, main_dtype(found.plan), vocab_multiple=vocab_multiple)
    return {run_config.FILE: made}


def _facts(found: _Planned) -> dict[str, Any]:
    """What `conversion.json` tells of an import beside its source and its options."""
    return {
        "family": found.source.reference.config["model_type"],
        "casts": casts(found.plan.tensors),
        "zero_filled": list(found.plan.zero),
        "tensors": {"in": len(found.source.reader.specs), "out": len(found.plan.tensors)},
    }


def left_out(source: Source) -> Iterator[str]:
    """The files of a source that do not travel, if there are any."""
    if source.left_out:
        yield f"left out, not part of the model: {', '.join(source.left_out)}"


def main_dtype(plan: Plan) -> np.dtype[Any]:
    """The dtype most parameters have."""
    counts: Counter[np.dtype[Any]] = Counter()
    for tensor_plan in plan.tensors:
        counts[tensor_plan.spec.dtype] += prod(tensor_plan.spec.shape)
    return counts.most_common(1)[0][0]


def notes(source: Source, plan: Plan) -> Iterator[str]:
    """What a user should know of this import."""
    yield from left_out(source)
    for old, new in casts(plan.tensors).items():
        yield f"weights are cast from {old} to {new}"
    if plan.zero:
        yield f"{len(plan.zero)} biases that the source does not have are written as zeros (megatron-core has one switch for all)"
    if others := plan.filled.keys() - set(plan.zero):
        yield f"{len(others)} weights that the source does not have are written as the numbers that change nothing there"
    if is_plain({spec.dtype for spec in source.reader.specs.values()}):
        for name in quantization(source.reference.config):
            yield f"`config.json` has `{name}`, but no weight is quantized: an export leaves it out"
    rope = rope_numbers(source.reference.config)
    told = {name: rope[name] for name in BUILT_IN_ROPE if name in rope}
    if rope["rope_type"] == "llama3" and told != BUILT_IN_ROPE:
        yield (
            f"rope scaling {told} is not what megatron-core's GPTModel builds in ({BUILT_IN_ROPE}): "
            "set `rotary_pos_emb.inv_freq` after building the model"
        )
