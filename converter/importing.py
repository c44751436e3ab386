"""Plan an import: from a Hugging Face model to the tensors, files and provenance of a Megatron checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from converter import families, prediction_layers, reference, run_config, side_files
from converter.checkpoint_files import CheckpointFormat, writer_of
from converter.checks import check_equal
from converter.comparison import CheckpointView
from converter.config import language_model, make_model, to_megatron
from converter.config_hybrid import not_computed
from converter.config_parts import NOT_COMPUTED, described
from converter.config_rope import BUILT_IN_ROPE, rope_numbers
from converter.conversion import Conversion
from converter.conversion_plan import ConversionPlan, OutputFiles, manifest, sizes_of
from converter.execution import Reporter
from converter.families import Family
from converter.hybrid import HYBRID
from converter.layout import Layout, make_layout
from converter.model import Model
from converter.originals import moved, original_name
from converter.pipeline_layout import layers_per_stage
from converter.plan import TensorPlan, as_stored, casts, casts_of_kept
from converter.planner import Plan
from converter.planner import to_megatron as plan_megatron
from converter.provenance import Provenance
from converter.quantization import is_plain, quantization
from converter.recognize import refuse_unfit
from converter.side_files import SideFiles
from converter.side_tensors import kept_weights, open_side_tensors
from converter.sources import Source
from converter.values import KEEP, dtype_of_most_parameters
from converter.views import megatron_view, tied
from formats.detect import open_megatron
from formats.errors import UserError
from formats.folder import Folder
from formats.huggingface import HuggingFaceWriter, Shard
from formats.iterations import TORCH
from formats.outputs import JoinedWriter, Writer
from formats.quantized.reader import DequantizedReader
from formats.spec import JoinedReader, Reader, RenamedReader, dtype_name, is_valid_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """The options that the bytes of an import depend on."""

    tp: int
    pp: int
    vpp: int
    pp_layout: str | Sequence[int] | None
    ep: int = 1
    etp: int | None = None
    """The shards of each expert; unless given as many as of other layers (`tp`), or what the model can have (1 with biases)."""

    layout: str | None = None
    """`gpt` or `hybrid` (see `converter.hybrid`); unless given, the source's, or what the family has by default."""

    dtype: str
    make_vocab_size_divisible_by: int
    integrity: bool
    kind: CheckpointFormat = field(default_factory=CheckpointFormat)


@dataclass(frozen=True, slots=True)
class _Import:
    """A source that was recognized as a model, and what is made of it."""

    source: Source
    family: Family
    model: Model
    layout: Layout
    plan: Plan
    beside: _Beside


class _Beside(NamedTuple):
    """What is stored next to the weights."""

    reader: Reader
    """Of the side tensors and the weights."""

    side_files: SideFiles
    side_tensors: Collection[str]
    """The scales of quantized weights, codes that nothing else gives back, and values that an offset rounds."""


def plan_import(source: Source, wanted: ImportOptions, reporter: Reporter) -> Conversion:
    """Return the conversion of a Hugging Face model to Megatron. Raises UserError if it cannot be converted exactly."""
    recognized = _recognize(source, wanted)
    for text in notes(source, recognized.plan, recognized.family):
        reporter.note(text)
    return _conversion(recognized, wanted)


def _conversion(recognized: _Import, wanted: ImportOptions, kept: Sequence[str] | None = None) -> Conversion:
    """Return the conversion; of a quantized source as far as headers tell, unless it is known which codes are `kept`."""
    source = recognized.source

    def settle(workers: int) -> Conversion:
        assert isinstance(source.reader, DequantizedReader)
        kept = kept_weights(source.reader, workers=workers)
        return _conversion(replace(recognized, beside=_beside(source, recognized.plan, kept)), wanted, kept)

    return Conversion(
        plan=_conversion_plan(recognized, wanted),
        reader=recognized.beside.reader,
        views=lambda written: _views(recognized, written, wanted.dtype),
        copies=recognized.beside.side_files.copies,
        check=lambda: _check_numbers(recognized),
        settle=settle if isinstance(source.reader, DequantizedReader) and kept is None else None,
        memory=source.memory,
    )


def _check_numbers(recognized: _Import) -> None:
    """Raise UserError where tensors differ that should be equal."""
    for name, other in recognized.plan.equal:
        check_equal(recognized.source.reader, name, other)


def _recognize(source: Source, wanted: ImportOptions) -> _Import:
    reader, config = source.reader, source.reference.config
    family = families.find(config.get("model_type"), wanted.layout or source.layout).rooted(reader.specs)
    model = make_model(family.CONFIG, config, vocab_multiple=wanted.make_vocab_size_divisible_by * wanted.tp)
    refuse_unfit(reader.specs, config, family, model, label=source.label)
    check_padding(model, divisible_by=wanted.make_vocab_size_divisible_by, tp=wanted.tp)
    etp = wanted.etp or to_megatron(family.CONFIG, config).get("expert_tensor_parallel_size")
    stages = layers_per_stage(wanted.pp_layout, mtp=model.get("mtp", 0))
    layout = make_layout(model, tp=wanted.tp, pp=wanted.pp, vpp=wanted.vpp, pp_layout=stages, ep=wanted.ep, etp=etp)
    passing = family.PASSTHROUGH_PREFIXES
    plan = plan_megatron(family.RULES, family.EXTRAS, model, reader.specs, dtype=wanted.dtype, passing=passing)
    return _Import(source, family, model, layout, plan, _beside(source, plan))


def _beside(source: Source, plan: Plan, kept: Iterable[str] = ()) -> _Beside:
    """Return what is stored next to the weights; of the quantized ones in `kept`, the codes too."""
    originals = {
        original_name(part.name): part.name for tensor_plan in moved(plan.tensors).values() for part in tensor_plan.parts
    }
    readers = open_side_tensors(source.reader, kept), RenamedReader(source.reader, originals)
    side_tensors = JoinedReader(*(each for each in readers if each))
    reader = JoinedReader(source.reader, side_tensors) if side_tensors.specs else source.reader
    names = tuple(side_tensors.specs)
    return _Beside(reader, side_files.collect_model(source.reference, reader, (*plan.extras, *names)), names)


def _conversion_plan(recognized: _Import, wanted: ImportOptions) -> ConversionPlan:
    source, plan, beside, folder = recognized.source, recognized.plan, recognized.beside, wanted.kind.folder
    command, options = source.command("hf-to-mcore"), _options(wanted, recognized)
    identity = {**options, **source.merged()}
    return ConversionPlan(
        source=source.label,
        tensor_plans=(*plan.tensors, *_extras(recognized)),
        output=OutputFiles(
            writer=with_extras(_writer(recognized, wanted), beside.side_files.extras, folder),
            documents={**recognized.beside.side_files.documents, **_documents(recognized, wanted)},
            copied=sizes_of(beside.side_files.copies),
            folder=folder,
            integrity=wanted.integrity,
            last=wanted.kind.last,
        ),
        provenance=Provenance(
            command=command,
            fields={"source": source.provenance, **source.merged(), "options": options, **_fields(recognized)},
            tensors=beside.reader.specs,
            passing="read",
            aliases=dict(plan.equal),
            hashed=wanted.integrity,
        ),
        manifest=manifest(command, identity, {**source.files, **beside.side_files.copies}),
        identity=identity,
        layout=parallel_sizes(recognized.model, recognized.layout),
    )


def parallel_sizes(model: Model, layout: Layout) -> dict[str, int]:
    """Return the sizes of a layout: all of tensor and pipeline parallelism, and those of experts where there are some."""
    experts = {"ep": layout.ep, "etp": layout.etp} if "experts" in model else {}
    return {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, **experts}


def _writer(recognized: _Import, wanted: ImportOptions) -> Writer:
    megatron = to_megatron(recognized.family.CONFIG, recognized.source.reference.config)
    multiple = wanted.make_vocab_size_divisible_by
    return writer_of(wanted.kind, recognized.plan, recognized.layout, megatron, vocab_multiple=multiple)


def with_extras(writer: Writer, extras: Shard | None, folder: str) -> Writer:
    """Return the layout of all files of the output that hold tensors: those of weights, and that of extras."""
    return JoinedWriter(writer, HuggingFaceWriter({f"{folder}{side_files.EXTRAS}": extras})) if extras else writer


def _extras(recognized: _Import) -> Iterable[TensorPlan]:
    """Return the plans of tensors that pass through untouched, in the order of their file."""
    extras = recognized.beside.side_files.extras
    return as_stored(extras.tensors).values() if extras else ()


def check_padding(model: Model, *, divisible_by: int, tp: int) -> None:
    """Raise UserError for a padded vocabulary of more rows than a tensor can have."""
    if not is_valid_shape((model.padded_vocab, model.hidden)):
        raise UserError(
            f"`--make-vocab-size-divisible-by {divisible_by}` and `--tp {tp}` pad the vocabulary "
            f"of {model.vocab} to {model.padded_vocab} rows of {model.hidden}, which is more than a tensor can hold",
            hint="Megatron-LM's default is 128",
        )


def _options(wanted: ImportOptions, recognized: _Import) -> dict[str, Any]:
    return {
        "layout": recognized.family.layout,
        **parallel_sizes(recognized.model, recognized.layout),
        "layers": list(recognized.layout.stages),
        "dtype": wanted.dtype,
        "vocab_divisible_by": wanted.make_vocab_size_divisible_by,
        "integrity": wanted.integrity,
        **wanted.kind.options,
    }


def _views(recognized: _Import, written: Folder, dtype: str) -> tuple[CheckpointView, CheckpointView]:
    """Return the source, and what an export of the written output would give. Its padding must be zero."""
    back, beside = open_megatron(written), recognized.beside
    tensor_plans = as_stored(beside.reader.specs)
    ties = tied(tensor_plans.values(), recognized.family, recognized.model)
    source = CheckpointView(recognized.source.label, beside.reader, tensor_plans, tied=ties, side_tensors=beside.side_tensors)
    output = megatron_view(back, reference.find(back, None), zero=_padding(recognized.plan, recognized.model))
    return (source, output) if dtype == KEEP else (source.cast(dtype), output.cast(dtype))


def _padding(plan: Plan, model: Model) -> dict[str, int]:
    """Return the tensors with padding, and the row at which it starts."""
    made = zip(plan.bound_rules, plan.tensors, strict=True)
    return {tensor_plan.spec.name: model.vocab for (rule, _), tensor_plan in made if rule.padded and tensor_plan.parts}


def _documents(recognized: _Import, wanted: ImportOptions) -> dict[str, bytes]:
    """Return the settings of Megatron-Bridge, which reads no files of ranks."""
    if wanted.kind.name == TORCH:
        return {}
    megatron = to_megatron(recognized.family.CONFIG, recognized.source.reference.config)
    multiple = wanted.make_vocab_size_divisible_by
    dtype = dtype_of_most_parameters(tensor_plan.spec for tensor_plan in recognized.plan.tensors)
    return {
        run_config.FILE: run_config.make(
            megatron, recognized.layout, dtype, vocab_multiple=multiple, ckpt_format=wanted.kind.name
        )
    }


def _fields(recognized: _Import) -> dict[str, Any]:
    """Return what `conversion.json` says of an import beside its source and its options."""
    return {
        "family": recognized.source.reference.config["model_type"],
        "casts": casts(recognized.plan.tensors),
        "zero_filled": list(recognized.plan.zero),
        "tensors": {"in": len(recognized.source.reader.specs), "out": len(recognized.plan.tensors)},
    }


def left_out(source: Source) -> Iterator[str]:
    """Yield a note on the files of a source that are not part of the output, if there are any."""
    if source.left_out:
        yield f"left out, not part of the model: {', '.join(source.left_out)}"
    if others := source.other_state:
        yield f"left out, no weights of the model: {len(others)} tensors such as `{others[0]}`"


def notes(source: Source, plan: Plan, family: Family) -> Iterator[str]:
    """Yield what a user should know of an import."""
    yield from left_out(source)
    kept = {tensor_plan.spec.name for tensor_plan in plan.kept}
    for old, new in casts(tensor_plan for tensor_plan in plan.tensors if tensor_plan.spec.name not in kept).items():
        yield f"weights are cast from {old} to {new}"
    yield from casts_of_kept(plan.kept)
    if plan.zero:
        yield f"{len(plan.zero)} biases that the source does not have are written as zeros (megatron-core has one switch for all)"
    if others := plan.filled.keys() - set(plan.zero):
        yield f"{len(others)} weights that the source does not have are written as the numbers that change nothing there"
    if isinstance(source.reader, DequantizedReader):
        yield from _notes_on_quantization(source.reader)
    elif is_plain({spec.dtype for spec in source.reader.specs.values()}):
        for name in quantization(source.reference.config):
            yield f"`config.json` has `{name}`, but no weight is quantized: an export leaves it out"
    if further := prediction_layers.further(plan.rules, plan.model, source.reader.specs):
        yield (
            f"{len(further)} tensors of layers of multi-token prediction pass through untouched: `{plan.model.mtp_field}` is "
            f"`{plan.model.get('mtp', 0)}`, and the files have more"
        )
    yield from _notes_on_function(source.reference.config, family)


def _notes_on_quantization(reader: DequantizedReader) -> Iterator[str]:
    """Yield how many weights are dequantized, by scheme."""
    for (scheme, dtype), count in Counter((weight.scheme.name, weight.spec.dtype) for weight in reader.weights.values()).items():
        yield f"{count} weights are dequantized to {dtype_name(dtype)}: {scheme}"


def _notes_on_function(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    """Yield what megatron-core's layers do not compute of a model whose weights are converted."""
    megatron = to_megatron(family.CONFIG, config)
    if family.WEIGHTS_ONLY:
        yield f"weights alone: `mbtrain` cannot train a `{config['model_type']}`: {family.WEIGHTS_ONLY}"
    for name, why in NOT_COMPUTED.items():
        if megatron.get(name) is not None:
            yield f"{described(name, megatron[name], verb=' is')}, with which `mbtrain` refuses the model: {why}"
    if length := megatron.get("exact_sequence_length"):
        yield f"`mbtrain` computes sequences of at most {length} tokens as transformers does, and refuses longer ones"
    if family.layout == HYBRID:
        yield from not_computed(megatron)
    elif megatron.get("rope_scaling"):
        yield from _notes_on_rope(config)


def _notes_on_rope(config: Mapping[str, Any]) -> Iterator[str]:
    rope = rope_numbers(language_model(config))
    scaling = {name: rope[name] for name in BUILT_IN_ROPE if name in rope}
    if scaling != BUILT_IN_ROPE:
        yield (
            f"rope scaling {scaling} is not what megatron-core's GPTModel builds in ({BUILT_IN_ROPE}): "
            "set `rotary_pos_emb.inv_freq` after building the model"
        )
