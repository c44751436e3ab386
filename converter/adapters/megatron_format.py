"""Adapters in Megatron checkpoints: an iteration that holds their tensors alone, `adapter.json`, and the model's luggage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from converter import families, reference
from converter.adapters import description as described
from converter.adapters.description import Description
from converter.adapters.names import AdaptedModule, Factor, adapted_modules, factors, peft_name
from converter.adapters.opened import AdapterReader
from converter.config import make_model
from converter.model import Model
from converter.plan import TensorPlan, list_names, same_tensor
from converter.rows import RowRange
from converter.side_files import HFReference
from formats import detect
from formats.errors import UserError
from formats.folder import Folder
from formats.megatron_reader import MegatronReader
from formats.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class MegatronAdapter:
    """An adapter in a checkpoint, and the model that it belongs to."""

    opened: AdapterReader
    reader: MegatronReader
    origin: HFReference
    model: Model


def open_megatron(folder: Folder) -> MegatronAdapter:
    """An adapter in a checkpoint: its root, or one iteration. Raises UserError for what is missing, left over, of another
    shape, or of a method that is not known here."""
    reader = detect.open_megatron(folder)
    try:
        description = described.read(reader.folder)
        described.check_method(description, label=reader.folder.label)
        origin = reference.find(reader, None)
        family = families.find(origin.config.get("model_type"))
        model = make_model(family.CONFIG, origin.config)
        found = _present(adapted_modules(family.RULES, model, canonical=description.canonical), description, reader.specs)
        reader.check(place.name(factor) for place in found for factor in factors(description.method))
    except UserError:
        reader.close()
        raise
    parts = {weight: made for place in found for weight, made in split(place, description, reader.specs)}
    scales = dict.fromkeys(parts, description.scale)
    return MegatronAdapter(AdapterReader(reader.folder.label, description, reader, parts, scales), reader, origin, model)


def _present(every: Iterable[AdaptedModule], description: Description, specs: Mapping[str, TensorSpec]) -> list[AdaptedModule]:
    """The places that have an adapter, with every tensor accounted for."""
    wanted = factors(description.method)
    # an adapter's place is there if any of its tensors is; with others missing, it is broken
    every = list(every)
    found = [place for place in every if any(place.name(factor) in specs for factor in Factor)]
    names = [place.name(factor) for place in found for factor in wanted]
    missing = [name for name in names if name not in specs]
    if missing:
        raise UserError(
            f"the checkpoint lacks {list_names(missing)}",
            hint=f"a {description.method} has {len(wanted)} tensors for each module",
        )
    over = sorted(specs.keys() - set(names))
    if over:
        mode = "with `canonical`" if description.canonical else "without `canonical`"
        raise UserError(
            f"the checkpoint holds {list_names(over)}, for which a {description.method} {mode} has no place in this family",
            hint=f"nothing is left out silently: are `{described.FILE}` and `config.json` of the same run?",
        )
    if not found:
        raise UserError("the checkpoint holds no tensors of an adapter")
    lacking = [place.name(Factor.A) for place in every if place not in found and _asks_for(description, place)]
    if lacking:
        raise UserError(
            f"the checkpoint lacks {list_names(lacking)}, which `target_modules` in `{described.FILE}` asks for",
            hint="its files are not whole, or that file is of another adapter",
        )
    for place in found:
        _check_shapes(place, wanted, description.dim, specs)
    return found


def _asks_for(description: Description, place: AdaptedModule) -> bool:
    return place.is_chosen(description.target_modules, description.exclude_modules)


def _check_shapes(place: AdaptedModule, wanted: Iterable[Factor], rank: int, specs: Mapping[str, TensorSpec]) -> None:
    for factor in wanted:
        name, should = place.name(factor), place.shape(factor, rank)
        if specs[name].shape != should:
            raise UserError(
                f"`{name}` has shape {list(specs[name].shape)}, "
                f"by `config.json` and the rank {rank} in `{described.FILE}` it should be {list(should)}",
                hint="either the weights or one of those files are of another adapter",
            )


def split(
    place: AdaptedModule, description: Description, specs: Mapping[str, TensorSpec]
) -> Iterator[tuple[str, dict[Factor, TensorPlan]]]:
    """For each Hugging Face weight of a place, PEFT's tensors as made of Megatron's. A is the same for all of them."""
    for part, weight in enumerate(place.weights):
        yield weight, {factor: _part(place, part, factor, description, specs) for factor in factors(description.method)}


def _part(
    place: AdaptedModule, part: int, factor: Factor, description: Description, specs: Mapping[str, TensorSpec]
) -> TensorPlan:
    stored, rank = specs[place.name(factor)], description.dim
    spec = TensorSpec(peft_name(place.weights[part], factor), factor.shape(place.rows[part], place.columns, rank), stored.dtype)
    if factor is Factor.A:
        return same_tensor(spec, stored)
    return TensorPlan(
        spec, (stored,), [RowRange(0, run.dst_row, run.src_row, run.rows) for run in place.runs() if run.part == part]
    )
