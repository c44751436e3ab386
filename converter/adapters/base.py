"""The base model of an adapter: which model it is, its weights under Hugging Face names, and whether an adapter fits them.

A Megatron checkpoint is split by the row table that exports it, so merging has no code for fused tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
from blake3 import blake3

from converter import families, reference, side_files
from converter.adapters.adapter import AdapterReader, Base, Delta
from converter.adapters.experts import in_stacks, separate
from converter.adapters.fingerprint import fingerprint
from converter.adapters.names import PREFIX, WEIGHT, adapted_modules, module_of
from converter.adapters.parameters import fused_experts
from converter.checks import check_filled
from converter.config import make_model
from converter.families import Family
from converter.hybrid import layout_of
from converter.model import Model
from converter.plan import check_dtypes, list_names
from converter.planned_reader import PlannedReader
from converter.planner import huggingface_tensors
from converter.recognize import refuse_unfit
from converter.rules import Rule, tied_names
from converter.side_files import HFReference
from converter.sources import Source, huggingface_source, megatron_source
from converter.views import megatron_view
from formats.arrays import as_bytes
from formats.detect import detect, open_huggingface, open_megatron
from formats.dtypes import MODEL_DTYPES
from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.spec import DTYPES, Array, TensorSpec, dtype_name

_CHANGEABLE = {DTYPES[name]: name for name in MODEL_DTYPES}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model that an adapter belongs to, without its weights."""

    identity: Base
    origin: HFReference
    rules: Sequence[Rule]
    """With the names of transformers' modules."""

    model: Model
    layout: str
    """Of the rules: what is asked for, else a checkpoint's own, else what the family has by default."""


def identify_base(folder: Folder, *, name: str, layout: str | None = None) -> BaseModel:
    """Read the configuration and the fingerprint of a model in either format.

    `name`: what to call it if the folder has no Hub id. `layout`: that of the adapter's modules; unless given, the model's.
    """
    if detect(folder).is_megatron:
        reader = open_megatron(folder)
        origin, layout = reference.find(reader, None), layout or layout_of(reader.specs)
    else:
        origin = side_files.from_folder(open_huggingface(folder, any_dtype=True).beside)
    family = families.find(origin.config.get("model_type"), layout).as_modules()
    identity = Base(folder.origin.get("id", name), fingerprint(folder))
    return BaseModel(identity, origin, family.RULES, make_model(family.CONFIG, origin.config), family.layout)


def open_base(folder: Folder, given: Folder | None) -> Source:
    """Open the weights of a model in either format, without side tensors.

    `given`: a folder with the `config.json` of a checkpoint that has none. Raises UserError for a folder that holds no model.
    """
    if not detect(folder).is_megatron:
        source = huggingface_source(open_huggingface(folder, any_dtype=True), given)
        _refuse_unfit(source)
        check_dtypes(source.reader.specs)
        return source
    checkpoint = open_megatron(folder)
    origin = reference.find(checkpoint, given)
    view = megatron_view(checkpoint, origin)
    for name in view.zero:
        check_filled(checkpoint, name, 0)
    for name, value in view.filled.items():
        check_filled(checkpoint, name, value)
    plans = view.only(view.tensor_plans.keys() - {*view.side_tensors}).tensor_plans
    return megatron_source(checkpoint, folder, origin, PlannedReader(view.reader, plans))


def _supported_family(source: Source) -> tuple[Family, Model] | None:
    """Return the family of a model with the names of its tensors, and its sizes. Merging does not need a supported family."""
    config = source.reference.config
    if config.get("model_type") not in families.names():
        return None
    family = families.find(config["model_type"]).rooted(source.reader.specs)
    return family, make_model(family.CONFIG, config)


def _refuse_unfit(source: Source) -> None:
    """Raise UserError for weights that are not the plain ones of their family, if it is supported."""
    if supported := _supported_family(source):
        refuse_unfit(source.reader.specs, source.reference.config, *supported, label=source.label)


def under_names_of(base: Source, adapter: AdapterReader) -> AdapterReader:
    """Return the adapter under the names of the base's tensors, which may not be those of its modules, and with those known that
    the base stores as [in, out].

    Raises UserError for DoRA of such a tensor, and if a family that is not supported has such.
    """
    supported = _supported_family(base)
    if supported is None:
        if adapter.fan_in_fan_out:
            raise UserError(
                "the adapter has `fan_in_fan_out: true`: some weights are stored as [in, out], and the base's `model_type`, "
                f"`{format_untrusted(base.reference.config.get('model_type'))}`, which says which, is not supported",
                hint="merge it with PEFT (`merge_and_unload`)",
            )
        return adapter
    family, model = supported
    named = families.find(base.reference.config["model_type"]).as_modules()
    stacked = named.stacked_as(family)
    adapter, _ = separate(adapter, named.RULES, model)
    if stacked != named:
        adapter = in_stacks(adapter, named.RULES, stacked.RULES, model)
    modules = _module_names(base, family, stacked, model)
    names = {module: name for name, module in modules.items()}

    def is_requested(weight: str) -> bool:
        return adapter.is_requested(modules.get(weight, weight))

    linear = adapted_modules(family.RULES, model, canonical=True)
    renamed = replace(
        adapter,
        parts={names.get(weight, weight): tensors for weight, tensors in adapter.parts.items()},
        scales={names.get(weight, weight): scale for weight, scale in adapter.scales.items()},
        is_requested=is_requested,
        transposed={weight for module in linear if module.transposed for weight in module.weights},
    )
    _refuse_transposed_dora(renamed)
    return renamed


def stacks_of(base: Source) -> dict[str, tuple[str, ...]]:
    """Return the tensors of a base that hold all experts of a layer, [experts, …], each with the names of single weights."""
    if not (supported := _supported_family(base)):
        return {}
    family, model = supported
    every = fused_experts((rule for rule in family.RULES if rule.is_stacked), model)
    return {layer.tensor: tuple(weight for (weight,) in layer.weights) for layer in every if layer.tensor in base.reader.specs}


def _weights_of(base: Source, stacks: Mapping[str, Sequence[str]]) -> dict[str, TensorSpec]:
    """Return the tensors of a base, with the weights of single experts in place of those that hold all."""
    specs = dict(base.reader.specs)
    for tensor, weights in stacks.items():
        spec = specs.pop(tensor)
        specs |= {weight: TensorSpec(weight, spec.shape[1:], spec.dtype) for weight in weights}
    return specs


def _module_names(base: Source, family: Family, named: Family, model: Model) -> dict[str, str]:
    """Return the tensors of a base whose names are not those of their modules, with the modules' names. `named`: the family with
    these."""
    if not family.ROOTS:
        return {}
    specs = base.reader.specs
    tensors = (huggingface_tensors(rules, model, specs) for rules in (family.RULES, named.RULES))
    start = family.MODULE_ROOT.partition(".")[0] + "."
    passing = [name for name in specs if name.startswith(family.PASSTHROUGH_PREFIXES or ("\0",)) and not name.startswith(start)]
    towers = {name: start + name for name in passing}
    return towers | {name: module for (name, _), (module, _) in zip(*tensors, strict=True) if name != module}


def _refuse_transposed_dora(adapter: AdapterReader) -> None:
    weight = min(adapter.parts.keys() & set(adapter.transposed), default="")
    if weight and adapter.description.method == "dora":
        raise UserError(
            f"`{weight}` is stored as [in, out], into which a DoRA cannot be merged here",
            hint="merge it with PEFT (`merge_and_unload`) and convert the merged model",
        )


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of an adapter that fits its base."""

    provenance: Mapping[str, Any]
    """Its fields in `conversion.json`."""

    nbytes: Mapping[str, int]
    """Bytes in memory of the change of each weight."""


def survey(adapter: AdapterReader, base: Source, folder: Folder, stacks: Mapping[str, Sequence[str]]) -> Survey:
    """Check that an adapter, stored in `folder`, fits a base model with these `stacks_of` experts. Reads all of the adapter, one
    weight at a time.

    Raises UserError for a weight that the base lacks, ties to another, or has with another shape or with a dtype that no change
    can be added to, for a change that is not finite, and for missing changes that the configuration requests.
    """
    specs = _weights_of(base, stacks)
    if not adapter.parts:
        raise UserError(f"the adapter `{folder.label}` changes no weights")
    _check_ties(base, adapter.parts)
    missing = sorted(adapter.parts.keys() - specs.keys())
    if missing:
        raise UserError(
            f"the adapter `{folder.label}` changes {list_names(missing)}, which `{base.label}` does not have",
            hint=_explain_missing(missing, specs),
        )
    _check_complete(adapter, base, specs, folder)
    digest, nbytes = blake3(), dict[str, int]()
    for weight in sorted(adapter.parts):
        delta = adapter.read_delta(weight)
        _check_delta(weight, specs[weight], delta)
        nbytes[weight] = sum(array.nbytes for array in _arrays(delta))
        digest.update(f"{weight}\0{delta.a.shape}{delta.b.shape}".encode())
        digest.update(struct.pack("<d", delta.scale))
        for array in _arrays(delta):
            digest.update(as_bytes(np.ascontiguousarray(array)))
    fields = {field: _as_json(value) for field, value in asdict(adapter.description).items()}
    return Survey({**folder.origin, **fields, "weights": len(nbytes), "blake3": digest.hexdigest()}, nbytes)


def _check_ties(source: Source, names: Collection[str]) -> None:
    """Raise UserError if an adapter changes one of two names of a tied tensor."""
    for name, other in _ties(source):
        changed = sorted({name, other} & set(names))
        if changed:
            raise UserError(
                f"the adapter changes `{changed[0]}`, but `config.json` ties `{name}` to `{other}`: one tensor for two uses",
                hint="untie the base first: store both, and set `tie_word_embeddings` to false in its `config.json`",
            )


def _ties(source: Source) -> list[tuple[str, str]]:
    """Return pairs of names for one tensor; none for an unsupported family."""
    supported = _supported_family(source)
    if supported is None:
        return []
    family, model = supported
    return [*tied_names(family.RULES, model).items()]


def _check_complete(adapter: AdapterReader, base: Source, specs: Mapping[str, TensorSpec], folder: Folder) -> None:
    """Raise UserError if an adapter lacks changes that its configuration requests: a lost file or pipeline stage."""
    candidates = _linear_layers(adapter, base) if adapter.all_linear else specs
    lacking = [
        weight
        for weight in sorted(candidates)
        if weight not in adapter.parts and len(specs[weight].shape) == 2 and adapter.is_requested(weight)
    ]
    if lacking:
        raise UserError(
            f"the adapter `{folder.label}` requests changes of {list_names(lacking)}, but its file holds no tensors for them",
            hint="its file is incomplete, or it was trained on another base model: only a part of it could be merged",
        )


def _linear_layers(adapter: AdapterReader, base: Source) -> list[str]:
    """Return the weights that PEFT's `all-linear` means: those of the family's linear layers, or for an unsupported family all
    weights whose last names the adapter has in some layer."""
    specs = base.reader.specs
    if supported := _supported_family(base):
        family, model = supported
        modules = adapted_modules(family.RULES, model, canonical=True)
        return [weight for module in modules for weight in module.weights if weight in specs]
    endings = {_last_name(name) for name in adapter.parts}
    return [name for name in specs if name.endswith(WEIGHT) and _last_name(name) in endings]


def _last_name(weight: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return module_of(weight).rpartition(".")[2]


def _explain_missing(missing: Sequence[str], specs: Mapping[str, TensorSpec]) -> str:
    """Return a hint for weights that the base lacks: their names have another prefix, or it is another model."""
    for name in missing:
        prefix, layers, tail = name.partition("layers.")
        match = next((other for other in specs if layers and other.endswith(f".{layers}{tail}")), None)
        if match:
            new = f'n.replace("{PREFIX}{prefix}", "{PREFIX}{match.partition(layers)[0]}", 1)'
            return (
                f"the base calls that weight `{match}`: the adapter was trained on an `AutoModel`, or on a model of text and "
                f"images; rename its tensors `n` to `{new}`"
            )
    return "it was trained on another base model"


def _as_json(value: Any) -> Any:
    """Return a value as JSON reads it back: `--resume` compares it with what the journal holds."""
    return list(cast("tuple[Any]", value)) if isinstance(value, tuple) else value


def _arrays(delta: Delta) -> list[Array]:
    return [delta.a, delta.b] if delta.magnitude is None else [delta.a, delta.b, delta.magnitude]


def _check_delta(name: str, spec: TensorSpec, delta: Delta) -> None:
    shape = delta.b.shape[0], delta.a.shape[-1]
    if spec.shape != shape:
        raise UserError(
            f"`{name}` has shape {list(spec.shape)}, its adapter is for one of {list(shape)}",
            hint="it was trained on another base model",
        )
    if not all(np.isfinite(array).all() for array in (*_arrays(delta), np.float64(delta.scale))):
        raise UserError(f"the adapter of `{name}` holds values that are not finite", hint="its training failed, or it is damaged")
    if spec.dtype not in _CHANGEABLE:
        raise UserError(
            f"`{name}` is {dtype_name(spec.dtype)}, to which nothing can be added",
            hint=f"merge into a base in {', '.join(_CHANGEABLE.values())}",
        )
