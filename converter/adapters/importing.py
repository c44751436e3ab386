"""From PEFT's files to everything that making a Megatron adapter checkpoint does: what it makes, and what lies beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from converter import families, provenance, reference, side_files
from converter.adapters import description as described
from converter.adapters import peft_config, peft_format
from converter.adapters.description import Base, Description
from converter.adapters.fingerprint import fingerprint
from converter.adapters.megatron_format import open_megatron
from converter.adapters.names import WEIGHT, AdaptedModule, Factor, adapted_modules, factors, peft_name, targets
from converter.adapters.opened import AdapterReader
from converter.adapters.peft_config import PeftConfig
from converter.adapters.peft_format import PeftAdapter, open_peft
from converter.comparison import CheckpointView
from converter.config import make_model
from converter.conversion import Conversion
from converter.conversion_plan import ConversionPlan, OutputFiles, manifest, sizes_of
from converter.execution import Reporter
from converter.model import Model
from converter.plan import TensorPlan, list_names, same_tensor
from converter.provenance import Provenance
from converter.rules import Rule
from converter.side_files import HFReference, SideFiles
from formats.arrays import same_bits
from formats.dcp_index import METADATA
from formats.detect import Format, detect
from formats.errors import UserError
from formats.folder import FileRef, Folder
from formats.iterations import iteration_folder
from formats.spec import Array, Reader, TensorSpec, dtype_name
from formats.torch_dist import TorchDistReader
from formats.torch_dist_writer import ShardedTensor, TorchDistWriter


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model beside which an adapter stands."""

    told: Base
    origin: HFReference
    rules: Sequence[Rule]
    model: Model


def open_base(folder: Folder, *, name: str) -> BaseModel:
    """A model in either format; `name` is what it is called where nobody knows its Hub id."""
    origin = (
        side_files.from_folder(folder)
        if detect(folder) is not Format.TORCH_DIST
        else reference.find(TorchDistReader(folder), None)
    )
    family = families.find(origin.config.get("model_type"))
    told = Base(folder.origin.get("id", name), fingerprint(folder))
    return BaseModel(told, origin, family.RULES, make_model(family.CONFIG, origin.config))


@dataclass(frozen=True, slots=True)
class _Planned:
    """An adapter of PEFT's, and what is made of it."""

    source: PeftAdapter
    description: Description
    tensor_plans: Sequence[TensorPlan]
    aliases: Mapping[str, str]
    """Tensors that are stored once though PEFT has them several times, and those they equal."""


def plan_import(folder: Folder, base: BaseModel, reporter: Reporter, *, canonical: bool) -> Conversion:
    """Return the conversion of a PEFT adapter to Megatron. Raises UserError for what Megatron's adapters cannot say exactly."""
    source = open_peft(folder)
    left_out = [name for name in folder.children() if name not in (peft_format.FILE, peft_config.FILE)]
    if left_out:
        reporter.note(f"left out, not part of the adapter: {', '.join(left_out)}")
    config, opened = source.config, source.opened
    _check_uniform(config, opened)
    outside = {name for rule in base.rules if "{layer}" not in rule.megatron for name in rule.names(0)[1]}
    found = _present(list(adapted_modules(base.rules, base.model, canonical=canonical)), config, opened, outside)
    for place in found:
        _check_part(place, config, opened)
    first = _module(found[0].weights[0])
    description = replace(
        opened.description,
        dim=config.rank(first),
        alpha=config.alpha(first),
        canonical=canonical,
        target_modules=targets(found, layers=base.model.layers),
        base=base.told,
    )
    tensor_plans = [tensor_plan for place in found for tensor_plan in _fused(place, opened, description)]
    aliases = {
        peft_name(weight, Factor.A): peft_name(place.weights[0], Factor.A) for place in found for weight in place.weights[1:]
    }
    return _conversion(folder, base, _Planned(source, description, tensor_plans, aliases))


def _module(weight: str) -> str:
    return weight.removesuffix(WEIGHT)


def _check_uniform(config: PeftConfig, opened: AdapterReader) -> None:
    """Megatron's adapters have one rank and one alpha for all modules."""
    modules = [_module(weight) for weight in opened.parts]
    for number, of in (("rank", config.rank), ("alpha", config.alpha)):
        other = next((one for one in modules if of(one) != of(modules[0])), None)
        if other is not None:
            raise UserError(
                f"`{modules[0]}` has {number} {of(modules[0])} and `{other}` has {of(other)}, by `{number}_pattern` in "
                f"`{peft_config.FILE}`, but a Megatron adapter has one for all",
                hint="merge it into its base model instead: `mbconvert merge`",
            )


def _present(every: Sequence[AdaptedModule], config: PeftConfig, opened: AdapterReader, outside: set[str]) -> list[AdaptedModule]:
    """The places that get an adapter, with every tensor of the source accounted for. `outside` are the model's weights that
    are in no layer."""
    weights = [weight for place in every for weight in place.weights]
    over = sorted(opened.parts.keys() - set(weights))
    whole = [weight for weight in over if weight in outside]
    if whole:
        raise UserError(
            f"`{peft_format.FILE}` holds an adapter for {list_names(whole)}, where Megatron's adapters have no place: "
            "they are on the "
            "linear layers of the decoder alone",
            hint="merge it into its base model instead: `mbconvert merge`",
        )
    if over:
        raise UserError(
            f"`{peft_format.FILE}` holds an adapter for {list_names(over)}, which Megatron has no adapter for in this family",
            hint="nothing is left out silently: is `--base` the model it was trained beside?",
        )
    missing = [weight for weight in weights if weight not in opened.parts and config.targets(_module(weight))]
    if missing:
        raise UserError(
            f"`{peft_config.FILE}` asks for an adapter for {list_names(missing)}, but `{peft_format.FILE}` holds none",
            hint="is `--base` the model it was trained beside, and is the file whole?",
        )
    found = [place for place in every if any(weight in opened.parts for weight in place.weights)]
    for place in found:
        absent = [weight for weight in place.weights if weight not in opened.parts]
        if absent:
            raise UserError(
                f"`{place.target}` is one module, but there is no adapter for {list_names(absent)}, which it is made of",
                hint="convert with `--canonical`, which keeps separate adapters",
            )
    return found


def _check_part(place: AdaptedModule, config: PeftConfig, opened: AdapterReader) -> None:
    """Raise UserError where shapes are of another model, or tensors that become one are not alike."""
    for weight, rows in zip(place.weights, place.rows, strict=True):
        for factor, tensor_plan in opened.parts[weight].items():
            should = factor.shape(rows, place.columns, config.rank(_module(weight)))
            if tensor_plan.spec.shape != should:
                raise UserError(
                    f"`{tensor_plan.spec.name}` has shape {list(tensor_plan.spec.shape)}, by the base model's "
                    "`config.json` it should be "
                    f"{list(should)}",
                    hint="is `--base` the model it was trained beside?",
                )
    first, *others = (opened.parts[weight] for weight in place.weights)
    for other in others:
        for factor in first:
            _check_dtypes(first[factor].spec, other[factor].spec, place)
        _check_equal(opened.reader, first[Factor.A].spec, other[Factor.A].spec, place)


def _check_dtypes(one: TensorSpec, other: TensorSpec, place: AdaptedModule) -> None:
    if one.dtype != other.dtype:
        raise UserError(
            f"`{one.name}` is {dtype_name(one.dtype)} and `{other.name}` is {dtype_name(other.dtype)}, "
            f"but `{place.target}` has one adapter",
            hint="convert with `--canonical`, which keeps separate adapters",
        )


def _check_equal(reader: Reader, one: TensorSpec, other: TensorSpec, place: AdaptedModule) -> None:
    if not same_bits(_whole(reader, one), _whole(reader, other)):
        raise UserError(
            f"`{one.name}` and `{other.name}` differ, but a fused adapter of `{place.target}` has one A for both",
            hint="convert with `--canonical`, which keeps separate adapters",
        )


def _whole(reader: Reader, spec: TensorSpec) -> Array:
    out = np.empty(spec.shape, spec.dtype)
    reader.read(spec.name, spec.full_region, out)
    return out


def _fused(place: AdaptedModule, opened: AdapterReader, description: Description) -> Iterator[TensorPlan]:
    """Megatron's tensors of a place as made of PEFT's."""
    for factor in factors(description.method):
        parts = [opened.parts[weight][factor].spec for weight in place.weights]
        spec = TensorSpec(place.name(factor), place.shape(factor, description.dim), parts[0].dtype)
        if factor is Factor.A:
            yield same_tensor(spec, parts[0])
        else:
            yield TensorPlan(spec, tuple(parts), tuple(place.runs()))


def _conversion(folder: Folder, base: BaseModel, found: _Planned) -> Conversion:
    opened, beside = found.source.opened, side_files.collect_again(base.origin)
    return Conversion(
        plan=_conversion_plan(folder, base, found, beside),
        reader=opened.reader,
        views=lambda written: (_side(opened), _side(open_megatron(written).opened)),
        copies=beside.copies,
    )


def _conversion_plan(folder: Folder, base: BaseModel, found: _Planned, beside: SideFiles) -> ConversionPlan:
    specs, opened = [tensor_plan.spec for tensor_plan in found.tensor_plans], found.source.opened
    options = {"canonical": found.description.canonical, "base": base.told.fingerprint}
    sources = {name: FileRef(folder, name) for name in (peft_format.FILE, peft_config.FILE)}
    return ConversionPlan(
        source=opened.label,
        tensor_plans=found.tensor_plans,
        output=OutputFiles(
            writer=TorchDistWriter([ShardedTensor(spec, ((spec.full_region, 0),)) for spec in specs], whole_model=False),
            documents={**beside.documents, described.FILE: described.make(found.description)},
            copied=sizes_of(beside.copies),
            folder=f"{iteration_folder(0)}/",
            integrity=True,
            last=(METADATA,),
        ),
        provenance=Provenance(
            command="adapter-to-mcore",
            fields=_facts(folder, base, found, options),
            tensors={
                copy.source: opened.reader.specs[copy.source] for tensor_plan in found.tensor_plans for copy in tensor_plan.copies
            },
            passing="read",
            aliases=found.aliases,
        ),
        manifest=manifest("adapter-to-mcore", options, {**sources, **beside.copies}),
        identity=options,
    )


def _facts(folder: Folder, base: BaseModel, found: _Planned, options: Mapping[str, Any]) -> dict[str, Any]:
    """What `conversion.json` tells beside the tensors' hashes."""
    return {
        "source": provenance.huggingface_source(folder, found.source.reader.shards),
        "options": options,
        "family": base.origin.config["model_type"],
        "tensors": {"in": len(found.source.opened.tensor_plans), "out": len(found.tensor_plans)},
    }


def _side(opened: AdapterReader) -> CheckpointView:
    return CheckpointView(opened.label, opened.reader, opened.tensor_plans)
