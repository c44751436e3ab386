"""Megatron adapter checkpoints: an iteration with only the adapter's tensors, `adapter.json`, and the model's side files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from converter import families, reference
from converter.adapter_files import DESCRIPTION, FLAG, NUMBER, OBJECT, SIZE, STRING, STRINGS, FieldType
from converter.adapters.adapter import METHODS, AdapterReader, Base, Description
from converter.adapters.names import AdaptedModule, Factor, adapted_modules, factors, module_of, peft_name
from converter.config import make_model
from converter.hybrid import GPT, HYBRID
from converter.model import Model
from converter.plan import TensorPlan, list_names, same_tensor
from converter.rows import RowRange, widest
from converter.rules import Rule
from converter.side_files import HFReference
from converter.transform import Transform
from formats.detect import open_megatron
from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.json_objects import read_json
from formats.megatron_reader import MegatronReader
from formats.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class MegatronAdapter:
    """An adapter in a checkpoint, and the model that it belongs to."""

    adapter: AdapterReader
    reader: MegatronReader
    origin: HFReference
    rules: Sequence[Rule]
    """With the names of transformers' modules."""

    model: Model
    others: Sequence[str]
    """The modules of Hugging Face's model without an adapter; all modules, if towers may have such last names."""


def open_megatron_adapter(folder: Folder) -> MegatronAdapter:
    """Open an adapter checkpoint: its root, or one iteration. Reads headers only.

    Raises UserError for a missing or unexpected tensor, a wrong shape, or an unknown method.
    """
    reader = open_megatron(folder)
    try:
        description = read_description(reader.folder)
        check_method(description, label=reader.folder.label)
        origin = reference.find(reader, None, layout=description.layout)
        family = families.find(origin.config.get("model_type"), description.layout).as_modules()
        model = make_model(family.CONFIG, origin.config)
        every = list(adapted_modules(family.RULES, model, canonical=description.canonical))
        modules = _find_present(every, description, reader.specs)
        _check_requested(every, modules, description)
        for module in modules:
            _check_shapes(module, description, reader.specs)
        reader.check(module.name(factor) for module in modules for factor in factors(description.method))
    except UserError:
        reader.close()
        raise
    parts = {weight: plans for module in modules for weight, plans in _split(module, description, reader.specs)}
    adapter = AdapterReader(
        label=reader.folder.label,
        description=description,
        reader=reader,
        parts=parts,
        scales=dict.fromkeys(parts, description.scale),
        fan_in_fan_out=any(module.transposed and not module.is_stacked for module in modules),
    )
    has_towers = bool(family.PASSTHROUGH_PREFIXES)
    single = [module for module in every if not module.is_stacked]
    others = [module_of(weight) for module in single for weight in module.weights if has_towers or weight not in parts]
    return MegatronAdapter(adapter, reader, origin, family.RULES, model, others)


def _find_present(
    every: Iterable[AdaptedModule], description: Description, specs: Mapping[str, TensorSpec]
) -> list[AdaptedModule]:
    """Return the modules with at least one tensor. Raises UserError unless their tensors are exactly those of `specs`."""
    expected_factors = factors(description.method)
    modules = [module for module in every if any(module.name(factor) in specs for factor in Factor)]
    names = [module.name(factor) for module in modules for factor in expected_factors]
    missing = [name for name in names if name not in specs]
    if missing:
        raise UserError(
            f"the checkpoint lacks {list_names(missing)}",
            hint=f"a {description.method} has {len(expected_factors)} tensors for each module",
        )
    unexpected = sorted(specs.keys() - set(names))
    if unexpected:
        _refuse_separate(unexpected, every, description)
        mode = "with `canonical`" if description.canonical else "without `canonical`"
        raise UserError(
            f"the checkpoint holds {list_names(unexpected)}, which a {description.method} {mode} does not have in this family",
            hint=f"nothing is left out silently: are `{DESCRIPTION}` and `config.json` of the same run?",
        )
    if not modules:
        raise UserError("the checkpoint holds no tensors of an adapter")
    return modules


def _refuse_separate(names: Iterable[str], every: Iterable[AdaptedModule], description: Description) -> None:
    """Raise UserError for separate adapters of a module whose weight is one tensor in Hugging Face's model."""
    single = {module.module: module.weights[0] for module in every if module.prefix.endswith(".adapter")}
    for name in names if description.canonical else ():
        module, separate, _ = name.partition(".adapter.adapter_")
        if separate and module in single:
            raise UserError(
                f"the checkpoint holds `{name}`, one of several adapters of `{module}`, but this family has one tensor for all, "
                f"`{single[module]}`, and PEFT one adapter",
                hint="train it with `peft.canonical=false`: the product of several A and B is not that of one A and one B",
            )


def _check_requested(every: Iterable[AdaptedModule], present: Collection[AdaptedModule], description: Description) -> None:
    """Raise UserError for a module that `target_modules` requests and that has no tensors."""
    prefixes = {module.prefix for module in present}
    absent = [
        module.name(Factor.A)
        for module in every
        if module.prefix not in prefixes and module.is_chosen(description.target_modules, description.exclude_modules)
    ]
    if absent:
        raise UserError(
            f"the checkpoint lacks {list_names(absent)}, which `target_modules` in `{DESCRIPTION}` requests",
            hint="the checkpoint is incomplete, or that file is of another adapter",
        )


def _check_shapes(module: AdaptedModule, description: Description, specs: Mapping[str, TensorSpec]) -> None:
    rank = description.dim
    for factor in factors(description.method):
        name, expected = module.name(factor), module.shape(factor, rank)
        if specs[name].shape != expected:
            raise UserError(
                f"`{name}` has shape {list(specs[name].shape)}, "
                f"by `config.json` and the rank {rank} in `{DESCRIPTION}` it should be {list(expected)}",
                hint="either the weights or one of those files are of another adapter",
            )


def _split(
    module: AdaptedModule, description: Description, specs: Mapping[str, TensorSpec]
) -> Iterator[tuple[str, dict[Factor, TensorPlan]]]:
    """Yield each Hugging Face weight of a module with PEFT's tensors, planned from Megatron's. All weights share A."""
    for part, weight in enumerate(module.weights):
        yield weight, {factor: _plan_part(module, part, factor, description, specs) for factor in factors(description.method)}


def _plan_part(
    module: AdaptedModule, part: int, factor: Factor, description: Description, specs: Mapping[str, TensorSpec]
) -> TensorPlan:
    stored, shape = specs[module.name(factor)], factor.shape(module.rows[part], module.columns, description.dim)
    spec = TensorSpec(peft_name(module.weights[part], factor), shape, stored.dtype)
    if factor is Factor.A:
        return same_tensor(spec, stored)
    ranges = [RowRange(0, run.dst_row, run.src_row, run.rows, run.step) for run in module.row_ranges() if run.part == part]
    return TensorPlan(spec, (stored,), ranges, transform=Transform(to_megatron=False, widest=widest(ranges)))


def encode_description(description: Description) -> bytes:
    """Return the contents of `adapter.json`. Layout `gpt` is left out: earlier versions know no other, and refuse new fields."""
    document = asdict(description)
    if description.layout == GPT:
        del document["layout"]
    return (json.dumps(document, indent=2) + "\n").encode()


def read_description(folder: Folder) -> Description:
    """Read `adapter.json` from an iteration's folder. Raises UserError if it is missing, or has an unknown or invalid field."""
    if not folder.has(DESCRIPTION):
        raise UserError(
            f"`{folder.label}` has no `{DESCRIPTION}`, so it is not an adapter",
            hint="an adapter is a folder with PEFT's `adapter_config.json`, or a checkpoint of a training run with `peft`",
        )
    document = read_json(folder, DESCRIPTION)
    _check_fields(document, _FIELDS, source=f"`{DESCRIPTION}`")
    if "method" not in document:
        raise UserError(f"`{DESCRIPTION}` has no `method`")
    lists = {name: tuple(document[name]) for name in ("target_modules", "exclude_modules") if name in document}
    values: dict[str, Any] = {**document, **lists, "base": _read_base(document.get("base"))}
    return Description(**values)


def _read_base(value: Any) -> Base | None:
    if value is None:
        return None
    OBJECT.check("base", value, source=f"`{DESCRIPTION}`")
    document = cast("dict[str, Any]", value)
    _check_fields(document, {"name": STRING, "fingerprint": STRING}, source=f"`base` of `{DESCRIPTION}`")
    return Base(document.get("name", ""), document.get("fingerprint", ""))


def check_method(description: Description, *, label: str) -> None:
    """Raise UserError for a method that PEFT does not have and that cannot be merged, and for a rank below 1."""
    if description.method not in METHODS:
        raise UserError(
            f"`{label}` is an adapter of the method `{format_untrusted(description.method)}`, which only its author can convert",
            hint=f"supported are: {', '.join(METHODS)}",
        )
    if description.layout not in (GPT, HYBRID):
        raise UserError(
            f"`layout` in `{DESCRIPTION}` is `{format_untrusted(description.layout)}`, which should be `{GPT}` or `{HYBRID}`",
            hint="the file is damaged, or a newer version wrote it",
        )
    if description.dim < 1:
        raise UserError(f"`dim` in `{DESCRIPTION}` is {description.dim}, which should be the rank, 1 or more")


def _check_fields(document: Mapping[str, Any], types: Mapping[str, FieldType], *, source: str) -> None:
    """Raise UserError for a field that is unknown or of another type."""
    for name, value in document.items():
        if name not in types:
            raise UserError(
                f"{source} has an unknown field `{format_untrusted(name)}`",
                hint="a newer version may have written it: this version would ignore what it says",
            )
        types[name].check(name, value, source=source)


_FIELDS = {
    "method": STRING, "dim": SIZE, "alpha": NUMBER, "use_rslora": FLAG, "canonical": FLAG, "dropout": NUMBER,
    "target_modules": STRINGS, "exclude_modules": STRINGS, "base": FieldType("an object or null", lambda _value: True),
    "layout": STRING,
}  # fmt: skip
"""`base` has fields of its own, see `_read_base`."""
assert set(_FIELDS) == {field.name for field in fields(Description)}
