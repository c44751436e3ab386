"""Plan an average: the weighted sum of checkpoints of one model and kind, in the files of the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from math import isfinite
from typing import Any

import numpy as np

from converter import consistency, families, provenance, reference, side_files
from converter.averaged import BLOCK, AveragedReader, Input, is_averaged
from converter.consistency import embedding_rows
from converter.conversion import Conversion
from converter.derived import DerivedCheckpoint, of_command
from converter.execution import Reporter
from converter.exporting import ExportOptions, plan_files
from converter.hybrid import layout_of
from converter.importing import left_out
from converter.masters import ROUNDED_TO, ProvenMasters
from converter.nemo_config import settings_of
from converter.plan import TensorPlan, as_stored, check_dtypes, list_names, pieces
from converter.resharding import ReshardOptions, plan_reshard
from converter.run import PIECE_BYTES
from converter.run_config import UnknownModelError
from converter.side_files import EXTRAS
from converter.sources import Source, huggingface_source
from converter.spellings import spelled_as
from converter.values import KEEP, MASTERS, WEIGHTS
from formats.arrays import same_bits
from formats.errors import UserError
from formats.folder import FileRef, Folder
from formats.huggingface import HuggingFaceReader
from formats.megatron_reader import MegatronReader
from formats.optimizer.open import open_optimizer
from formats.optimizer.state import MASTER
from formats.quantized.reader import DequantizedReader
from formats.shard_files import INDEX
from formats.spec import JoinedReader, Reader, extent

_INSTEAD = "`--from weights` averages the weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageOptions:
    """The options that the bytes of an average depend on."""

    weights: Sequence[float] | None
    """One for each checkpoint; equal if None."""

    values_from: str | None
    """What is averaged: the weights, or their fp32 masters; if None masters where all checkpoints have them."""

    hf_config: Folder | None
    integrity: bool


def shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return each checkpoint's share, which add up to 1.

    Raises UserError unless there is a finite weight for each, and their sum is above 0.

    >>> shares([1, 3], 2), shares(None, 2)
    ([0.25, 0.75], [0.5, 0.5])
    """
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count:
        raise UserError(f"`--weights` has {len(given)} numbers, and there are {count} checkpoints")
    total = sum(given)
    if not all(map(isfinite, given)) or not total > 0:
        raise UserError(
            f"`--weights {','.join(f'{weight:g}' for weight in given)}` add up to {total:g}",
            hint="each is divided by their sum, which has to be above 0",
        )
    return [weight / total for weight in given]


def average_models(
    readers: Sequence[HuggingFaceReader], wanted: AverageOptions, reporter: Reporter, *, workers: int
) -> Conversion:
    """Return the conversion of Hugging Face directories to their average. Raises UserError if they are of different models."""
    if wanted.values_from == MASTERS:
        raise UserError(f"`{readers[0].folder.label}` has no fp32 masters", hint="`--from master` is for Megatron checkpoints")
    sources = [huggingface_source(reader, wanted.hf_config) for reader in readers]
    inputs = _inputs([(source.label, source.reader) for source in sources], wanted)
    first = sources[0]
    for other in sources[1:]:
        _check_configs(first, other)
    for text in _notes_on_models(sources):
        reporter.note(text)
    source = replace(first, reader=AveragedReader(inputs), memory=first.memory * len(sources) + _memory(inputs, workers))
    options = ExportOptions(hf_config=None, max_shard_size=None, dtype=KEEP, integrity=wanted.integrity)
    conversion = plan_files(source, list(as_stored(source.reader.specs).values()), options, reporter)
    described = [source.provenance for source in sources]
    return _averaged(conversion, inputs, _Sources(described=described, files=[source.files for source in sources]))


def average_megatron(
    readers: Sequence[MegatronReader], roots: Sequence[Folder], wanted: AverageOptions, reporter: Reporter, *, workers: int
) -> Conversion:
    """Return the conversion of Megatron checkpoints to their average, in the layout of the first. `roots` are the folders that
    the user named. Raises UserError if they are of different models."""
    inputs = _inputs([(reader.folder.label, reader) for reader in readers], wanted)
    for reader in readers:
        reader.check()
    _check_settings(readers, wanted.hf_config)
    inputs, of_masters = _with_masters(inputs, readers, wanted.values_from, reporter)
    for text in _notes_on_checkpoints(readers):
        reporter.note(text)
    first = DerivedCheckpoint(readers[0], AveragedReader(inputs, of_masters))
    options = ReshardOptions.of_same_layout(readers[0], hf_config=wanted.hf_config, weights_only=True, integrity=wanted.integrity)
    conversion = plan_reshard(first, roots[0], options, reporter, workers=workers)
    conversion = replace(conversion, memory=conversion.memory + _memory(inputs, workers))
    sources = [provenance.megatron_source(root, reader) for root, reader in zip(roots, readers, strict=True)]
    files = [
        {name: FileRef(reader.folder, name) for name in sorted({*reader.files, *reader.index_files}) if reader.folder.has(name)}
        for reader in readers
    ]
    beside = [(reader.folder.label, _beside(reader)) for reader in readers]
    record = _Sources(described=sources, files=files, beside=beside, of_masters=bool(of_masters))
    return _averaged(conversion, inputs, record)


def _beside(reader: MegatronReader) -> Reader:
    """Return the reader of what a checkpoint holds beside its weights."""
    there = reader.folder.has(EXTRAS)
    return HuggingFaceReader(reader.folder, files=[EXTRAS], any_dtype=True) if there else JoinedReader()


def _inputs(readers: Sequence[tuple[str, Reader]], wanted: AverageOptions) -> list[Input]:
    """Return what is averaged. Raises UserError unless all have the same tensors, in the same shapes and dtypes."""
    each = shares(wanted.weights, len(readers))
    inputs = [Input(label, reader, share) for (label, reader), share in zip(readers, each, strict=True)]
    check_dtypes(inputs[0].weights.specs)
    for other in inputs[1:]:
        _check_same(inputs[0], other)
    return inputs


_SAME = "only checkpoints of one model can be averaged, stored under the same names"


def _check_same(one: Input, other: Input) -> None:
    specs, others = one.weights.specs, other.weights.specs
    for has, lacks in ((one, other), (other, one)):
        if names := sorted(has.weights.specs.keys() - lacks.weights.specs.keys()):
            raise UserError(f"`{has.label}` holds {list_names(names)}, which `{lacks.label}` does not", hint=_hint(one, other))
    for name, spec in specs.items():
        for what, mine, theirs in (
            ("shape", list(spec.stored_shape), list(others[name].stored_shape)),
            ("dtype", spec.stored_dtype, others[name].stored_dtype),
        ):
            if mine != theirs:
                hint = _SAME if what == "shape" else "cast one of them first, for example with `--dtype` of a conversion"
                raise UserError(
                    f"`{name}` has {what} {mine} in `{one.label}` and {theirs} in `{other.label}`",
                    hint=hint,
                )


def _hint(one: Input, other: Input) -> str:
    """Return what to do with inputs of different names. Norms alone may differ because layers spell them in two ways."""
    for local, fused in ((one, other), (other, one)):
        names = set(fused.weights.specs)
        if {spelled_as(names, name) for name in local.weights.specs} == names:
            return (
                f"`{local.label}` names norms as layers without Transformer Engine do; `mbconvert reshard {local.label} DST "
                f"--weights-only` stores them as `{fused.label}` does"
            )
    return _SAME


def _check_configs(one: Source, other: Source) -> None:
    """Raise UserError if two `config.json` describe different models."""
    kinds = [source.reference.config.get("model_type") for source in (one, other)]
    if kinds[0] != kinds[1]:
        raise UserError(f"`{one.label}` is a `{kinds[0]}`, `{other.label}` a `{kinds[1]}`", hint=_SAME)
    if kinds[0] in families.names():
        layout = families.find(kinds[0]).layout
        consistency.check(one.reference, [other.reference], [], rows=None, layout=layout)


def _check_settings(readers: Sequence[MegatronReader], given: Folder | None) -> None:
    """Raise UserError if what one of the others says of its model is not what the first says."""
    first, *others = readers
    rows, layout = embedding_rows(first.specs), layout_of(first.specs)
    try:
        origin = reference.find(first, given, any_settings=True)
    except UnknownModelError:
        origin = reference.find(first, given, any_settings=True, vocab=rows)
    for other in others:
        own, label = side_files.load(other.folder), other.folder.label
        recorded = [replace(each, origin=f"{each.origin} of `{label}`") for each in settings_of(other)]
        configs = [replace(own, origin=f"`{label}`'s")] if own else []
        consistency.check(origin, configs, recorded, rows=rows, layout=layout)


def _with_masters(
    inputs: Sequence[Input], readers: Sequence[MegatronReader], values_from: str | None, reporter: Reporter
) -> tuple[Sequence[Input], set[str]]:
    """Return the inputs with the masters that are averaged, and the names of their weights; none where weights are."""
    if values_from == WEIGHTS:
        return inputs, set()
    masters = [_masters(reader, demanded=values_from == MASTERS) for reader in readers]
    present = [each for each in masters if each]
    if len(present) < len(masters):
        if present:
            reporter.note("weights are averaged: not all checkpoints have fp32 masters")
        return inputs, set()
    specs = inputs[0].weights.specs
    names = {name for name, spec in specs.items() if spec.dtype in ROUNDED_TO and all(name in each.specs for each in present)}
    rest = f"; {len(specs) - len(names)} others have none" if len(names) < len(specs) else ""
    reporter.note(f"{len(names)} weights are averaged from their fp32 masters, and rounded once{rest}")
    return [replace(model, masters=each) for model, each in zip(inputs, present, strict=True)], names


def _masters(reader: MegatronReader, *, demanded: bool) -> Reader | None:
    """Return the reader of a checkpoint's masters. Raises UserError where there are none and they are `demanded`."""
    try:
        state = open_optimizer(reader)
    except UserError:
        if demanded:
            raise
        return None
    masters = state.states.get(MASTER) if state else None
    if demanded and not masters:
        raise UserError(f"`{reader.folder.label}` has no fp32 masters", hint=_INSTEAD)
    return ProvenMasters(masters, reader, instead=_INSTEAD) if masters else None


def _notes_on_models(sources: Sequence[Source]) -> Iterator[str]:
    first, *others = sources
    yield from left_out(first)
    if any(isinstance(source.reader, DequantizedReader) for source in sources):
        yield "quantized weights are averaged as the numbers that they mean, and written as these"
    for other in others:
        yield from _different_files(first.reference.files, other.reference.files, (first.label, other.label))


def _notes_on_checkpoints(readers: Sequence[MegatronReader]) -> Iterator[str]:
    if any(reader.has_optimizer for reader in readers):
        yield "optimizer state is left out: only weights are averaged"
    first, *others = (side_files.stored(reader.folder) for reader in readers)
    for other, reader in zip(others, readers[1:], strict=True):
        yield from _different_files(first, other, (readers[0].folder.label, reader.folder.label))


def _different_files(one: Mapping[str, FileRef], other: Mapping[str, FileRef], labels: tuple[str, str]) -> Iterator[str]:
    """Yield a note on the side files that two checkpoints do not have alike."""
    names = sorted((one.keys() | other.keys()) - {INDEX, provenance.FILE})
    unlike = [name for name in names if name not in one or name not in other or not _same_file(one[name], other[name])]
    if unlike:
        yield f"`{labels[1]}` has other side files than `{labels[0]}`, whose are taken: {list_names(unlike)}"


def _same_file(one: FileRef, other: FileRef) -> bool:
    return one.size == other.size and all(a == b for a, b in zip_longest(one.bands(), other.bands()))


def _memory(inputs: Sequence[Input], workers: int) -> int:
    """Return the bytes that averaging holds: a piece of each input, of masters in fp32, beside what one reader alone needs."""
    pieces_of_masters = 2 + 2 * len(inputs) if any(model.masters for model in inputs) else len(inputs)
    return workers * (pieces_of_masters * PIECE_BYTES + 2 * BLOCK * 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sources:
    """What is known of the checkpoints beside their weights, in their order."""

    described: Sequence[Mapping[str, Any]]
    """What `conversion.json` says of them."""

    files: Sequence[Mapping[str, FileRef]]
    """Those that their tensors are read from."""

    beside: Sequence[tuple[str, Reader]] = ()
    """The name for people and a reader of what each holds beside its weights."""

    of_masters: bool = False


def _averaged(conversion: Conversion, inputs: Sequence[Input], sources: _Sources) -> Conversion:
    """Return the conversion of the first checkpoint as that of an average."""
    options = {"weights": [model.share for model in inputs], "from": MASTERS if sources.of_masters else WEIGHTS}
    numbered = {f"{number}/{name}": file for number, each in enumerate(sources.files) for name, file in each.items()}

    def check() -> None:
        conversion.check()
        _check_equal([(model.label, model.weights) for model in inputs])
        _check_equal(sources.beside, every=True)

    fields = {"averaged_with": list(sources.described[1:])}
    return replace(of_command(conversion, "average", options=options, fields=fields, files=numbered), check=check)


def _check_equal(readers: Sequence[tuple[str, Reader]], *, every: bool = False) -> None:
    """Raise UserError for tensors that are not averaged, integers or `every` one, and that differ."""
    for (label, first), (other_label, other) in product(readers[:1], readers[1:]):
        for name, spec in {**other.specs, **first.specs}.items():
            if is_averaged(spec) and not every:
                continue
            if first.specs.get(name) != other.specs.get(name) or not _same_values(first, other, name):
                raise UserError(
                    f"`{name}` ({spec.stored_dtype}) differs between `{label}` and `{other_label}`, and is not averaged",
                    hint="what has no plain numbers, or is beside the weights of a Megatron checkpoint, has to be equal",
                )


def _same_values(one: Reader, other: Reader, name: str) -> bool:
    spec = one.specs[name]
    for piece in pieces([TensorPlan(spec)], limit=PIECE_BYTES):
        left, right = (np.empty(extent(piece.region), spec.dtype) for _ in range(2))
        one.read(name, piece.region, left)
        other.read(name, piece.region, right)
        if not same_bits(left, right):
            return False
    return True
