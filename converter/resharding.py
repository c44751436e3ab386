"""Plan a reshard: the weights and the optimizer state of a Megatron checkpoint, in the files of another layout.

Tensors of a checkpoint are global: parallel sizes only say which chunk of each is in which rank's file, and layouts `gpt` and
`hybrid` what it is called. So each tensor of the output is one tensor of the source, and no Hugging Face tensor is made in
between. Only the rows that pad a vocabulary differ: their number depends on tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from converter import families, provenance, reference, run_config, side_files
from converter.checkpoint_files import weights_writer
from converter.comparison import CheckpointView
from converter.config import make_model, to_megatron
from converter.consistency import embedding_rows
from converter.conversion import Conversion
from converter.conversion_plan import ConversionPlan, OutputFiles, manifest, sizes_of
from converter.derived import parallel_sizes_of
from converter.encoding import quantized_source
from converter.execution import Reporter
from converter.families import Family
from converter.hybrid import layout_of
from converter.importing import check_padding, parallel_sizes, with_extras
from converter.layout import Layout, make_layout
from converter.master_reader import WORKER_BYTES, reader_of
from converter.model import Model
from converter.nemo_config import settings_of
from converter.originals import original_names
from converter.padded_vocab import divisible_by
from converter.pipeline_layout import layers_per_stage
from converter.plan import Specs, TensorPlan, as_stored, casts, same_tensor
from converter.planner import Plan, stored_tensors
from converter.provenance import Provenance
from converter.rules import fill
from converter.run import PIECE_BYTES
from converter.run_config import UnknownModelError
from converter.run_state import TrainingRun, notes_on_run, open_run, refuse_casts, run_state, state_plans, state_reader
from converter.side_files import EXTRAS, HFReference
from converter.sources import Source, megatron_source
from converter.tables import Table, Tables
from converter.values import KEEP, MASTERS, WEIGHTS, dtype_of_most_parameters, target_dtype
from converter.views import untouched
from converter.workers import DEFAULT
from formats.dcp_index import METADATA
from formats.detect import open_megatron
from formats.errors import UserError
from formats.folder import FileRef, Folder
from formats.huggingface import HuggingFaceReader, Shard, specs_of
from formats.iterations import iteration_folder
from formats.megatron_reader import MegatronReader
from formats.optimizer.open import open_optimizer
from formats.spec import DTYPES, JoinedReader, Reader, TensorSpec, is_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardOptions:
    """The options that the bytes of a reshard depend on."""

    layout: str | None
    """`gpt` or `hybrid` (see `converter.hybrid`); None for the source's."""

    tp: int
    pp: int
    vpp: int
    pp_layout: str | Sequence[int] | None
    ep: int
    etp: int | None
    make_vocab_size_divisible_by: int | None
    """None for what the source says of its own padding."""

    hf_config: Folder | None
    weights_only: bool
    values_from: str = WEIGHTS
    """`weights`, or `master`: the fp32 masters of the optimizer state in place of the weights."""

    dtype: str
    integrity: bool

    @staticmethod
    def of_same_layout(
        reader: MegatronReader, *, hf_config: Folder | None, weights_only: bool, integrity: bool
    ) -> ReshardOptions:
        """Return the options of a command that changes weights and keeps a checkpoint's layout."""
        return ReshardOptions(layout=None, **parallel_sizes_of(reader), make_vocab_size_divisible_by=None, hf_config=hf_config,
                              weights_only=weights_only, dtype=KEEP, integrity=integrity)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reshard:
    """A checkpoint that was recognized as a model, and the layout that it gets."""

    source: Source
    family: Family
    """In the layout of the output."""

    megatron: Mapping[str, Any]
    """The model's fields in Megatron."""

    model: Model
    layout: Layout
    plan: Plan
    vocab_multiple: int
    iteration: int
    side_files: Mapping[str, FileRef]
    extras: Shard | None
    run: TrainingRun | None
    states: Sequence[Mapping[str, TensorPlan]]
    """Plans of the optimizer state, by the names of the weights."""

    @property
    def tensor_plans(self) -> tuple[TensorPlan, ...]:
        """Those of all tensors, in the order of the files."""
        extras = as_stored(self.extras.tensors).values() if self.extras else ()
        return (*self.plan.tensors, *chain.from_iterable(state.values() for state in self.states), *extras)


def plan_reshard(
    reader: MegatronReader,
    root: Folder,
    wanted: ReshardOptions,
    reporter: Reporter,
    *,
    run: TrainingRun | None = None,
    workers: int = DEFAULT,
) -> Conversion:
    """Return the conversion of a Megatron checkpoint to another layout. `root` is the folder that the user named, `run` what the
    output keeps of a training run: by default that of the checkpoint.

    Raises UserError if the checkpoint holds what would be lost, or does not say enough of its model.
    """
    if run is None and not wanted.weights_only:
        run = open_run(reader)
    reader.check()  # first: it frees the index, whose memory the plan then takes
    reader = reader_of(reader, wanted.values_from)
    recognized = _recognize(reader, root, wanted, run)
    for text in _notes(recognized, reader):
        reporter.note(text)
    return Conversion(
        plan=_conversion_plan(recognized, reader, wanted),
        reader=recognized.source.reader,
        views=lambda written: _views(recognized, written),
        copies=recognized.side_files,
        memory=workers * (PIECE_BYTES + (WORKER_BYTES if run or wanted.values_from == MASTERS else 0)),  # columns are gathered
    )


def _recognize(reader: MegatronReader, root: Folder, wanted: ReshardOptions, run: TrainingRun | None) -> _Reshard:
    origin, unknown = _reference(reader, wanted)
    stored, family = _families(origin, reader, wanted)
    megatron, multiple = to_megatron(family.CONFIG, origin.config), _vocab_multiple(reader, wanted)
    model = make_model(family.CONFIG, origin.config, vocab_multiple=multiple * wanted.tp)
    check_padding(model, divisible_by=multiple, tp=wanted.tp)
    etp = wanted.etp or megatron.get("expert_tensor_parallel_size")
    stages = layers_per_stage(wanted.pp_layout, mtp=model.get("mtp", 0))
    layout = make_layout(model, tp=wanted.tp, pp=wanted.pp, vpp=wanted.vpp, pp_layout=stages, ep=wanted.ep, etp=etp)
    tensors, extras = _with_extras(reader, origin, family, model)
    source = megatron_source(reader, root, origin, JoinedReader(tensors, run.reader) if run else tensors)
    origin = replace(origin, shards={})  # a plan does not need its hundreds of thousands of names
    source = replace(source, reference=origin)
    plan = _plan(family, model, _stored(stored, origin, reader.specs), dtype=wanted.dtype)
    if run:
        refuse_casts(plan.tensors)
    return _Reshard(
        source=source,
        family=family,
        megatron={**megatron, **({"vocab_size": None, "padded_vocab_size": model.padded_vocab} if unknown else {})},
        model=model,
        layout=layout,
        plan=plan,
        vocab_multiple=multiple,
        iteration=_iteration(reader),
        side_files=_side_files(reader.folder, origin, given=wanted.hf_config is not None),
        extras=extras,
        run=run,
        states=state_plans(plan.tensors, run) if run else (),
    )


def _families(origin: HFReference, reader: MegatronReader, wanted: ReshardOptions) -> tuple[Family, Family]:
    """Return the model's family in the layout of the source, and in that of the output."""
    kind, names, before = origin.config.get("model_type"), specs_of(origin.shards), layout_of(reader.specs)
    return families.find(kind, before).rooted(names), families.find(kind, wanted.layout or before).rooted(names)


def _reference(reader: MegatronReader, wanted: ReshardOptions) -> tuple[HFReference, bool]:
    """Return what says which model the checkpoint holds, and whether its number of tokens is unknown: all rows of the vocabulary
    then count as tokens."""
    given, any_settings = wanted.hf_config, _keeps_settings(reader, wanted)
    if given and reader.folder.below(side_files.FILES).has(side_files.CONFIG):
        raise UserError(
            f"`{reader.folder.label}` has its own `{side_files.CONFIG}`, beside that of `--hf-config`",
            hint="leave `--hf-config` out: it is for a checkpoint that does not say what model it holds",
        )
    try:
        return reference.find(reader, given, any_settings=any_settings), False
    except UnknownModelError:
        return reference.find(reader, given, any_settings=any_settings, vocab=embedding_rows(reader.specs)), True


def _keeps_settings(reader: MegatronReader, wanted: ReshardOptions) -> bool:
    """Does the output keep the source's `run_config.yaml`? In another layout it is of another class, with other fields."""
    return reader.folder.has(run_config.FILE) and wanted.layout in (None, layout_of(reader.specs))


def _vocab_multiple(reader: MegatronReader, wanted: ReshardOptions) -> int:
    """Return what each rank's rows of the vocabulary are padded to a multiple of."""
    recorded = settings_of(reader)
    return wanted.make_vocab_size_divisible_by or divisible_by(recorded[0].settings if recorded else {})


def _iteration(reader: MegatronReader) -> int:
    number: Any = reader.common_state().get("iteration")
    return number if is_size(number) else 0


def _stored(family: Family, origin: HFReference, source: Specs) -> list[TensorSpec]:
    """Return the stored tensors in the order of the family's rules, which is the same in every layout."""
    model = make_model(family.CONFIG, origin.config)
    return stored_tensors(Tables(family.RULES, model), model, source)


def _plan(family: Family, model: Model, stored: Sequence[TensorSpec], *, dtype: str) -> Plan:
    """Return the plan that makes each Megatron tensor of `model` from the stored one."""
    tables = Tables(family.RULES, model)
    made = [
        _tensor_plan(table, fill(table.rule.megatron, index), spec, dtype)
        for (table, index), spec in zip(tables, stored, strict=True)
    ]
    return Plan(tuple(made), family.RULES, model)


def _tensor_plan(table: Table, name: str, stored: TensorSpec, dtype: str) -> TensorPlan:
    kept = DTYPES[table.rule.keep_dtype] if table.rule.keep_dtype and dtype != KEEP else None
    spec = TensorSpec(name, table.shape, kept or target_dtype(stored, dtype))
    return same_tensor(stored if stored == spec else spec, stored)  # a large model has hundreds of thousands


def _with_extras(reader: MegatronReader, origin: HFReference, family: Family, model: Model) -> tuple[Reader, Shard | None]:
    """Return a reader of the weights and extras, and the file of the extras. Raises UserError for extras that are not the
    model's."""
    if not reader.folder.has(EXTRAS):
        return reader, None
    beside = HuggingFaceReader(reader.folder, files=[EXTRAS], any_dtype=True)
    side_tensors = {*quantized_source(origin).names, *original_names(family.RULES, model)}
    untouched({name: spec for name, spec in beside.specs.items() if name not in side_tensors}, family, model)
    return JoinedReader(reader, beside), beside.shards[EXTRAS]


def _side_files(iteration: Folder, origin: HFReference, *, given: bool) -> dict[str, FileRef]:
    return {**side_files.stored(iteration), **(side_files.collect_again(origin).copies if given else {})}


def _notes(recognized: _Reshard, reader: MegatronReader) -> Iterator[str]:
    """Yield what a user should know of a reshard."""
    for old, new in casts(recognized.plan.tensors).items():
        yield f"weights are cast from {old} to {new}"
    stored, rows = embedding_rows(reader.specs), recognized.model.padded_vocab
    if stored and stored > rows:
        tokens, left = recognized.model.vocab, stored - rows
        yield f"{tokens} tokens are padded to {rows} rows; the last {left} of the source's {stored} are left out"
    if reader.others and not recognized.run:
        yield f"{len(reader.others)} tensors that are not weights (such as `{reader.others[0]}`) are left out"
    if recognized.run:
        yield from notes_on_run(recognized.run, parallel_sizes(recognized.model, recognized.layout))
    elif reader.args() and not reader.folder.has(run_config.FILE):
        yield f"{run_config.ARGS} are left out; `{run_config.FILE}` says what model it is"


def _conversion_plan(recognized: _Reshard, reader: MegatronReader, wanted: ReshardOptions) -> ConversionPlan:
    source, folder, options = recognized.source, f"{iteration_folder(recognized.iteration)}/", _options(recognized, wanted)
    sizes = parallel_sizes(recognized.model, recognized.layout)
    writer = weights_writer(
        recognized.plan,
        recognized.layout,
        recognized.megatron,
        iteration=recognized.iteration,
        states=[{name: plan.spec for name, plan in state.items()} for state in recognized.states],
        run=run_state(reader, recognized.run, sizes, padded_vocab=recognized.model.padded_vocab) if recognized.run else None,
    )
    return ConversionPlan(
        source=source.label,
        tensor_plans=recognized.tensor_plans,
        output=OutputFiles(
            writer=with_extras(writer, recognized.extras, folder),
            documents={run_config.FILE: _run_config(recognized, reader, wanted)},
            copied=sizes_of(recognized.side_files),
            folder=folder,
            integrity=wanted.integrity,
            last=(METADATA,),
        ),
        provenance=Provenance(
            command="reshard",
            fields=_fields(recognized, reader, options),
            tensors=writer.specs if not recognized.extras else {**writer.specs, **recognized.extras.tensors},
            passing="made",
            hashed=wanted.integrity,
        ),
        manifest=manifest("reshard", options, {**source.files, **recognized.side_files}),
        identity=options,
        layout=sizes,
    )


def _options(recognized: _Reshard, wanted: ReshardOptions) -> dict[str, Any]:
    return {
        "layout": recognized.family.layout,
        **parallel_sizes(recognized.model, recognized.layout),
        "layers": list(recognized.layout.stages),
        "dtype": wanted.dtype,
        "vocab_divisible_by": recognized.vocab_multiple,
        "hf_config": wanted.hf_config.name if wanted.hf_config else None,
        "weights_only": wanted.weights_only,
        **({"from": wanted.values_from} if wanted.values_from != WEIGHTS else {}),
        "integrity": wanted.integrity,
    }


def _fields(recognized: _Reshard, reader: MegatronReader, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `conversion.json` says: the source with what its own record says, the options, the family, and counts."""
    recorded = provenance.recorded(reader.folder)
    return {
        "source": {**recognized.source.provenance, **({"conversion": recorded} if recorded else {})},
        "options": options,
        "family": recognized.source.reference.config["model_type"],
        "casts": casts(recognized.plan.tensors),
        "tensors": {"in": len(reader.specs), "out": len(recognized.plan.tensors)},
    }


def _run_config(recognized: _Reshard, reader: MegatronReader, wanted: ReshardOptions) -> bytes:
    """Return the source's `run_config.yaml` with the new parallel sizes, or one of the model."""
    multiple = recognized.vocab_multiple
    if not _keeps_settings(reader, wanted):
        dtype = dtype_of_most_parameters(tensor_plan.spec for tensor_plan in recognized.plan.tensors)
        return run_config.make(recognized.megatron, recognized.layout, dtype, vocab_multiple=multiple)
    return run_config.with_parallel_sizes(
        reader.folder.get(run_config.FILE),
        recognized.megatron,
        recognized.layout,
        vocab_multiple=multiple,
        padded_vocab=recognized.model.padded_vocab,
    )


def _views(recognized: _Reshard, written: Folder) -> tuple[CheckpointView, CheckpointView]:
    """Return the source as it is resharded, and the written output."""
    back = open_megatron(written)
    back.check()
    beside = [HuggingFaceReader(written, files=[EXTRAS], any_dtype=True)] if recognized.extras else []
    optimizer = open_optimizer(back) if recognized.run else None
    output = JoinedReader(back, *beside, *([state_reader(optimizer)] if optimizer else []))
    source = CheckpointView(
        recognized.source.label,
        recognized.source.reader,
        {tensor_plan.spec.name: tensor_plan for tensor_plan in recognized.tensor_plans},
    )
    return source, CheckpointView(written.label, output, as_stored(output.specs))
