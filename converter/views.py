"""Open any checkpoint for a comparison: its tensors under Hugging Face names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from converter import families, prediction_layers, provenance, reference
from converter.comparison import CheckpointView
from converter.config import make_model
from converter.dequantization import dequantized, weights_of
from converter.encoding import quantized_source
from converter.families import Family
from converter.hybrid import layout_of
from converter.master_reader import reader_of
from converter.model import Model
from converter.originals import original_names, with_originals
from converter.plan import TensorPlan, as_stored, check_dtypes
from converter.planner import to_huggingface
from converter.reference import UnknownModelError
from converter.rules import extra_names, tied_names
from converter.side_files import CONFIG, EXTRAS, HFReference, config_of
from converter.side_tensors import open_side_tensors, schemes
from converter.spellings import spelled_as
from converter.torchtitan import translated
from converter.values import CHOICES, KEEP, MASTERS, WEIGHTS
from formats.detect import open_checkpoint
from formats.errors import UserError
from formats.folder import Folder
from formats.huggingface import HuggingFaceReader, specs_of
from formats.megatron_reader import MegatronReader
from formats.quantized.reader import DequantizedReader
from formats.spec import JoinedReader, Reader, TensorSpec


def open_views(one: Folder, other: Folder) -> tuple[CheckpointView, CheckpointView]:
    """Open both directories. One that does not say what model it holds is taken to hold the other's.

    Two Megatron checkpoints that both do not say, or whose settings describe other tensors, are viewed under Megatron's names. A
    checkpoint beside an export from fp32 masters is viewed by its own. Raises UserError for other formats.
    """
    first, second = readers = open_checkpoint(one, any_dtype=True), open_checkpoint(other, any_dtype=True)
    try:
        return _exported_views(readers)
    except UserError:
        if isinstance(first, HuggingFaceReader) or isinstance(second, HuggingFaceReader) or not _same_tensors(first, second):
            raise
        return _native(first, second), _native(second, first)


def _exported_views(readers: Sequence[HuggingFaceReader | MegatronReader]) -> tuple[CheckpointView, CheckpointView]:
    """Return the views of two checkpoints, of Megatron ones as what an export of them would write."""
    models = [None if isinstance(reader, HuggingFaceReader) else _model_of(reader) for reader in readers]
    sides: list[CheckpointView] = []
    as_numbers = not _coded_alike(readers)
    for reader, own, neighbour, borrowed in zip(readers, models, readers[::-1], models[::-1], strict=True):
        if isinstance(reader, HuggingFaceReader):
            config = _config(reader) or _config_of_other(reader, neighbour, borrowed)
            sides.append(huggingface_view(reader, config, as_numbers=as_numbers))
        elif origin := own or _borrowed(neighbour, borrowed):
            values, dtype = _exported_from(neighbour) if reader.has_optimizer else (WEIGHTS, KEEP)
            sides.append(megatron_view(reader_of(reader, values), origin, dtype=dtype))
        else:
            sides.append(_native(reader, neighbour))
    return sides[0], sides[1]


def _exported_from(neighbour: HuggingFaceReader | MegatronReader) -> tuple[str, str]:
    """Return what an export took its values from and in which dtype it wrote them, if those are masters: other casts are for the
    user to name."""
    match provenance.recorded(neighbour.folder):
        case {"command": "mcore-to-hf", "options": {"from": str(values), "dtype": str(dtype)}} if values == MASTERS:
            return values, dtype if dtype in CHOICES else KEEP
        case _:
            return WEIGHTS, KEEP


def _model_of(reader: MegatronReader) -> HFReference | None:
    """Return what a checkpoint says of its model; None if it says nothing."""
    try:
        return reference.find(reader, None)
    except UnknownModelError:
        return None


def _borrowed(neighbour: HuggingFaceReader | MegatronReader, model: HFReference | None) -> HFReference | None:
    """Return the model of the other checkpoint, without its side files."""
    if isinstance(neighbour, HuggingFaceReader):
        return HFReference(config_of(neighbour), f"`{neighbour.folder.label}`'s")
    return HFReference(model.config, f"`{neighbour.folder.label}`'s") if model else None


def _config_of_other(
    reader: HuggingFaceReader, neighbour: HuggingFaceReader | MegatronReader, model: HFReference | None
) -> Mapping[str, Any]:
    """Return the other checkpoint's `config.json` for a model in chunks, which has seldom one itself; empty for others."""
    if reader.shards:
        return {}
    if isinstance(neighbour, HuggingFaceReader):
        return _config(neighbour)
    return model.config if model else {}


def _coded_alike(readers: Sequence[HuggingFaceReader | MegatronReader]) -> bool:
    """Do both hold the same weights in codes of the same kind? Then these are compared, and not the numbers that they mean."""
    coded = [
        {weight.codes.name: weight.codes.stored_dtype for weight in weights_of(reader.specs, _config(reader)).values()}
        for reader in readers
        if isinstance(reader, HuggingFaceReader)
    ]
    return len(coded) == len(readers) and coded[0] == coded[1]


def _config(reader: HuggingFaceReader) -> dict[str, Any]:
    return config_of(reader) if reader.beside.has(CONFIG) else {}


def huggingface_view(
    reader: HuggingFaceReader, config: Mapping[str, Any] | None = None, *, as_numbers: bool = False
) -> CheckpointView:
    """Return the view of a Hugging Face directory, with tied tensors if its family is supported: `as_numbers`, of quantized
    weights as the numbers that they mean. `config`: the model's, unless given its own."""
    config = _config(reader) if config is None else config
    tensors = dequantized(reader, config) if as_numbers else translated(reader, config)
    beside = open_side_tensors(tensors)
    view = CheckpointView(
        reader.folder.label,
        JoinedReader(tensors, beside) if beside else tensors,
        as_stored({**tensors.specs, **(beside.specs if beside else {})}),
        side_tensors=beside.specs.keys() if beside else (),
        schemes=schemes(tensors.weights) if isinstance(tensors, DequantizedReader) else "",
    )
    if config.get("model_type") not in families.names():
        return view
    family = families.find(config["model_type"]).rooted(tensors.specs)
    return replace(view, tied=tied(view.tensor_plans.values(), family, make_model(family.CONFIG, config)))


def megatron_view(
    reader: MegatronReader, origin: HFReference, *, zero: Mapping[str, int] | None = None, dtype: str = KEEP
) -> CheckpointView:
    """Return the view of a Megatron checkpoint: what an export would write. `zero` are further rows that must be zero."""
    known = specs_of(origin.shards)
    family = families.find(origin.config.get("model_type"), layout_of(reader.specs)).rooted(known)
    model = make_model(family.CONFIG, origin.config)
    plan = to_huggingface(family.RULES, model, reader.specs, dtype=dtype, known=known)
    reader.check()
    names = {*quantized_source(origin).names, *original_names(family.RULES, model)}
    tensor_plans, extras = with_side_files(plan.tensors, family, model, origin, side_tensors=names)
    tensor_plans, tensors = with_originals(tensor_plans, JoinedReader(reader, *extras))
    side_tensors = as_stored({name: tensors.specs[name] for name in sorted(names & tensors.specs.keys())})
    return CheckpointView(
        reader.folder.label,
        tensors,
        {**{tensor_plan.spec.name: tensor_plan for tensor_plan in tensor_plans}, **side_tensors},
        side_tensors=side_tensors.keys(),
        tied=tied(plan.tensors, family, model),
        zero={**dict.fromkeys(plan.zero, 0), **(zero or {})},
        filled={name: value for name, value in plan.filled.items() if value},
    )


def with_side_files(
    tensor_plans: Sequence[TensorPlan], family: Family, model: Model, origin: HFReference, *, side_tensors: Collection[str] = ()
) -> tuple[list[TensorPlan], list[HuggingFaceReader]]:
    """Return the plans with those of tensors that Megatron does not have, a tied output layer and extras, and the readers of
    the extras. `side_tensors` get no plans, only readers."""
    again = [
        tensor_plan
        for name, tensor_plan in tied(tensor_plans, family, model).items()
        if any(name in shard.tensors for shard in origin.shards.values())
    ]
    if origin.extras is None:
        return [*tensor_plans, *again], []
    reader = HuggingFaceReader(origin.extras.folder, files=[origin.extras.name], any_dtype=True)
    extras = {name: spec for name, spec in reader.specs.items() if name not in side_tensors}
    return [*tensor_plans, *again, *untouched(extras, family, model)], [reader]


def untouched(extras: Mapping[str, TensorSpec], family: Family, model: Model) -> Iterable[TensorPlan]:
    """Return the plans of extras. Raises UserError for other tensors: a tampered file must not replace weights."""
    known = extra_names(family.EXTRAS, model) | prediction_layers.further(family.RULES, model, extras)
    passing = family.PASSTHROUGH_PREFIXES
    check_dtypes(extras)
    for spec in extras.values():
        if spec.name not in known and not (passing and spec.name.startswith(passing)):
            raise UserError(f"`{EXTRAS}` holds `{spec.name}` of shape {list(spec.shape)}, for which this family has no place")
    return as_stored(extras).values()


def tied(tensor_plans: Iterable[TensorPlan], family: Family, model: Model) -> dict[str, TensorPlan]:
    """Return the plans of tensors that a Hugging Face model may store a second time, made of those they equal."""
    names = tied_names(family.RULES, model)
    equal = set(names.values())
    made = {tensor_plan.spec.name: tensor_plan for tensor_plan in tensor_plans if tensor_plan.spec.name in equal}
    return {
        name: replace(made[other], spec=replace(made[other].spec, name=name)) for name, other in names.items() if other in made
    }


def _same_tensors(one: Reader, other: Reader) -> bool:
    """Do both hold tensors of the same names, however norms are spelled, and of the same shapes?"""
    shapes = [
        {spelled_as(neighbour.specs, name): spec.shape for name, spec in reader.specs.items()}
        for reader, neighbour in ((one, other), (other, one))
    ]
    return shapes[0] == shapes[1]


def _native(reader: MegatronReader, neighbour: Reader) -> CheckpointView:
    """Return the view of a checkpoint under Megatron's names, as the other one spells them."""
    reader.check()
    spelled = {spelled_as(neighbour.specs, name): tensor_plan for name, tensor_plan in as_stored(reader.specs).items()}
    tensor_plans = {
        name: replace(tensor_plan, spec=replace(tensor_plan.spec, name=name)) for name, tensor_plan in spelled.items()
    }
    return CheckpointView(reader.folder.label, reader, tensor_plans)
