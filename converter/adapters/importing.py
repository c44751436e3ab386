"""Plan a Megatron adapter checkpoint from PEFT's files: its tensors, and the model's side files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from converter import provenance, side_files
from converter.adapter_files import DESCRIPTION, PEFT_CONFIG, PEFT_WEIGHTS
from converter.adapters.adapter import AdapterReader, Description
from converter.adapters.base import BaseModel
from converter.adapters.experts import separate
from converter.adapters.megatron import encode_description, open_megatron_adapter
from converter.adapters.names import AdaptedModule, Factor, adapted_modules, factors, module_of, peft_name, targets
from converter.adapters.peft import PeftAdapter, open_peft_adapter
from converter.comparison import CheckpointView
from converter.conversion import Conversion
from converter.conversion_plan import ConversionPlan, OutputFiles, manifest, sizes_of
from converter.execution import Reporter
from converter.plan import TensorPlan, list_names, same_tensor
from converter.provenance import Provenance
from converter.rows import RowRange, follow_one_another, widest
from converter.rules import alternatives, is_layered
from converter.side_files import SideFiles
from converter.transform import Transform
from formats.arrays import same_bits
from formats.dcp_index import METADATA
from formats.errors import UserError
from formats.folder import FileRef, Folder
from formats.iterations import iteration_folder
from formats.spec import Array, Reader, TensorSpec, dtype_name
from formats.torch_dist_writer import ShardedTensor, TorchDistWriter


@dataclass(frozen=True, slots=True)
class _Planned:
    """A PEFT adapter, and the tensors planned from it."""

    source: PeftAdapter
    description: Description
    tensor_plans: Sequence[TensorPlan]
    aliases: Mapping[str, str]
    """Tensors that PEFT has several times and Megatron once, and the stored tensors that they equal."""


def plan_import(folder: Folder, base: BaseModel, reporter: Reporter, *, canonical: bool) -> Conversion:
    """Plan an import. Raises UserError for whatever Megatron's adapters cannot represent exactly."""
    source = _with_each_expert(open_peft_adapter(folder), base, canonical=canonical)
    left_out = [name for name in folder.children() if name not in (PEFT_WEIGHTS, PEFT_CONFIG)]
    if left_out:
        reporter.note(f"left out, not part of the adapter: {', '.join(left_out)}")
    _check_uniform(source)
    every = list(adapted_modules(base.rules, base.model, canonical=canonical))
    modules = _find_adapted(every, source, base)
    for module in modules:
        _check_shapes(module, source)
        _check_fused(module, source.adapter)
    first = module_of(modules[0].weights[0])
    description = replace(
        source.adapter.description,
        dim=source.config.rank(first),
        alpha=source.config.alpha(first),
        canonical=canonical and any(".adapter_" in module.prefix for module in every),
        target_modules=targets(modules, every),
        layout=base.layout,
        base=base.identity,
    )
    tensor_plans = [tensor_plan for module in modules for tensor_plan in _fuse(module, source.adapter, description)]
    aliases = {
        peft_name(weight, Factor.A): peft_name(module.weights[0], Factor.A) for module in modules for weight in module.weights[1:]
    }
    return _conversion(folder, base, _Planned(source, description, tensor_plans, aliases))


def _with_each_expert(source: PeftAdapter, base: BaseModel, *, canonical: bool) -> PeftAdapter:
    """Return the adapter with the tensors of each expert on their own."""
    adapter, parameters = separate(source.adapter, base.rules, base.model, by_part=canonical)
    return replace(source, adapter=adapter, config=replace(source.config, parameters=parameters))


def _check_uniform(source: PeftAdapter) -> None:
    """Raise UserError unless all modules have one rank and one alpha, as Megatron's adapters do."""
    config, (first, *others) = source.config, [module_of(weight) for weight in source.adapter.parts]
    for number, of in (("rank", config.rank), ("alpha", config.alpha)):
        other = next((module for module in others if of(module) != of(first)), None)
        if other is not None:
            raise UserError(
                f"`{first}` has {number} {of(first)} and `{other}` has {of(other)}, by `{number}_pattern` in `{PEFT_CONFIG}`, "
                "but a Megatron adapter has one for all",
                hint="merge it into its base model instead: `mbconvert merge`",
            )


def _find_adapted(every: Sequence[AdaptedModule], source: PeftAdapter, base: BaseModel) -> list[AdaptedModule]:
    """Return the modules that get an adapter. Raises UserError unless they take every tensor of the source."""
    stored, weights = source.adapter.parts, [weight for module in every for weight in module.weights]
    _refuse_unexpected(sorted(stored.keys() - set(weights)), base)
    missing = [weight for weight in weights if weight not in stored and source.config.targets(module_of(weight))]
    if missing:
        raise UserError(
            f"`{PEFT_CONFIG}` requests an adapter for {list_names(missing)}, but `{PEFT_WEIGHTS}` holds none",
            hint="is `--base` the model it was trained on, and is the file complete?",
        )
    modules = [module for module in every if any(weight in stored for weight in module.weights)]
    _check_experts(every, modules)
    for module in modules:
        absent = [weight for weight in module.weights if weight not in stored]
        if absent:
            raise UserError(
                f"`{module.target}` is one module, but there is no adapter for {list_names(absent)}, which it is made of",
                hint=_USE_CANONICAL,
            )
    return modules


def _check_experts(every: Sequence[AdaptedModule], present: Sequence[AdaptedModule]) -> None:
    """Raise UserError unless all experts of a layer have adapters or none has: Megatron stores and trains them together."""
    targets, prefixes = {module.target for module in present}, {module.prefix for module in present}
    absent = next((module for module in every if module.target in targets and module.prefix not in prefixes), None)
    if absent is not None:
        raise UserError(
            f"`{absent.weights[0]}` has no adapter, and other experts of its layer have one; Megatron has them for all or none",
            hint="merge it into its base model instead: `mbconvert merge`",
        )


_USE_CANONICAL = "convert with `--canonical`, which keeps separate adapters"


def _refuse_unexpected(weights: Sequence[str], base: BaseModel) -> None:
    """Raise UserError for adapted weights that no module has."""
    outside_layers = {name for rule in base.rules if not is_layered(rule) for name in alternatives(rule.huggingface)}
    outside = [weight for weight in weights if weight in outside_layers]
    if outside:
        raise UserError(
            f"`{PEFT_WEIGHTS}` holds an adapter for {list_names(outside)}, but Megatron's adapters are on the linear layers of "
            "the decoder alone",
            hint="merge it into its base model instead: `mbconvert merge`",
        )
    if weights:
        raise UserError(
            f"`{PEFT_WEIGHTS}` holds an adapter for {list_names(weights)}, which Megatron has no adapter for in this family",
            hint="nothing is left out silently: is `--base` the model it was trained on?",
        )


def _check_shapes(module: AdaptedModule, source: PeftAdapter) -> None:
    """Raise UserError for shapes of another base model."""
    for weight, rows in zip(module.weights, module.rows, strict=True):
        for factor, tensor_plan in source.adapter.parts[weight].items():
            spec, expected = tensor_plan.spec, factor.shape(rows, module.columns, source.config.rank(module_of(weight)))
            if spec.shape != expected:
                raise UserError(
                    f"`{spec.name}` has shape {list(spec.shape)}, by the base model's `config.json` it should be "
                    f"{list(expected)}",
                    hint="is `--base` the model it was trained on?",
                )


def _check_fused(module: AdaptedModule, adapter: AdapterReader) -> None:
    """Raise UserError unless the parts of a module have equal dtypes and the same A, bit for bit."""
    first, *others = (adapter.parts[weight] for weight in module.weights)
    for other in others:
        for factor in first:
            _check_dtypes(first[factor].spec, other[factor].spec, module)
        _check_equal(adapter.reader, first[Factor.A].spec, other[Factor.A].spec, module)


def _check_dtypes(one: TensorSpec, other: TensorSpec, module: AdaptedModule) -> None:
    if one.dtype != other.dtype:
        raise UserError(
            f"`{one.name}` is {dtype_name(one.dtype)} and `{other.name}` is {dtype_name(other.dtype)}, "
            f"but `{module.target}` has one adapter",
            hint=_USE_CANONICAL,
        )


def _check_equal(reader: Reader, one: TensorSpec, other: TensorSpec, module: AdaptedModule) -> None:
    if not same_bits(_read_all(reader, one), _read_all(reader, other)):
        raise UserError(
            f"`{one.name}` and `{other.name}` differ, but a fused adapter of `{module.target}` has one A for both",
            hint=_USE_CANONICAL,
        )


def _read_all(reader: Reader, spec: TensorSpec) -> Array:
    out = np.empty(spec.shape, spec.dtype)
    reader.read(spec.name, spec.full_region, out)
    return out


def _fuse(module: AdaptedModule, adapter: AdapterReader, description: Description) -> Iterator[TensorPlan]:
    """Plan Megatron's tensors of a module from PEFT's."""
    for factor in factors(description.method):
        parts = [adapter.parts[weight][factor].spec for weight in module.weights]
        spec = TensorSpec(module.name(factor), module.shape(factor, description.dim), parts[0].dtype)
        if factor is Factor.A:
            yield same_tensor(spec, parts[0])
        else:
            yield _plan_fused(spec, parts, tuple(module.row_ranges()))


def _plan_fused(spec: TensorSpec, parts: Sequence[TensorSpec], ranges: Sequence[RowRange]) -> TensorPlan:
    """Plan a tensor from rows of others, and note whether it takes the rows of each from the first to the last: a tensor that is
    hashed while it is read has to be read in order."""
    in_order = all(follow_one_another([rows for rows in ranges if rows.part == part]) for part in range(len(parts)))
    transform = Transform(to_megatron=True, widest=widest(ranges), in_order=False)
    return TensorPlan(spec, tuple(parts), ranges, transform=None if in_order else transform)


def _conversion(folder: Folder, base: BaseModel, planned: _Planned) -> Conversion:
    adapter, copied = planned.source.adapter, side_files.collect_again(base.origin)
    return Conversion(
        plan=_conversion_plan(folder, base, planned, copied),
        reader=adapter.reader,
        views=lambda written: (_view(adapter), _view(open_megatron_adapter(written).adapter)),
        copies=copied.copies,
    )


def _conversion_plan(folder: Folder, base: BaseModel, planned: _Planned, copied: SideFiles) -> ConversionPlan:
    specs, adapter = [tensor_plan.spec for tensor_plan in planned.tensor_plans], planned.source.adapter
    options = {"canonical": planned.description.canonical, "base": base.identity.fingerprint}
    sources = {name: FileRef(folder, name) for name in (PEFT_WEIGHTS, PEFT_CONFIG)}
    return ConversionPlan(
        source=adapter.label,
        tensor_plans=planned.tensor_plans,
        output=OutputFiles(
            writer=TorchDistWriter([ShardedTensor(spec, ((spec.full_region, 0),)) for spec in specs], whole_model=False),
            documents={**copied.documents, DESCRIPTION: encode_description(planned.description)},
            copied=sizes_of(copied.copies),
            folder=f"{iteration_folder(0)}/",
            integrity=True,
            last=(METADATA,),
        ),
        provenance=Provenance(
            command="adapter-to-mcore",
            fields=_provenance_fields(folder, base, planned, options),
            tensors={name: adapter.reader.specs[name] for tensor_plan in planned.tensor_plans for name in tensor_plan.sources},
            passing="read",
            aliases=planned.aliases,
        ),
        manifest=manifest("adapter-to-mcore", options, {**sources, **copied.copies}),
        identity=options,
    )


def _provenance_fields(folder: Folder, base: BaseModel, planned: _Planned, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `conversion.json` besides the tensors' hashes."""
    return {
        "source": provenance.huggingface_source(folder, planned.source.reader.shards),
        "options": options,
        "family": base.origin.config["model_type"],
        "tensors": {"in": len(planned.source.adapter.tensor_plans), "out": len(planned.tensor_plans)},
    }


def _view(adapter: AdapterReader) -> CheckpointView:
    return CheckpointView(adapter.label, adapter.reader, adapter.tensor_plans)
