"""Any directory as a side of a comparison: what it holds under Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from converter import families, reference
from converter.carried import CONFIG, EXTRAS, Reference
from converter.comparison import Side
from converter.config import make_model
from converter.families import Family
from converter.model import Model
from converter.plan import Making, as_stored, to_huggingface
from converter.reference import UnknownModelError
from converter.rules import fill
from formats.detect import Format, detect
from formats.errors import UserError
from formats.folder import Folder
from formats.huggingface import HuggingFaceReader
from formats.json_objects import read_json
from formats.spec import Array, Joined, Reader, Region, TensorSpec, ViewSpec
from formats.torch_dist import TorchDistReader


def open_sides(one: Folder, other: Folder) -> tuple[Side, Side]:
    """Both directories. One that does not say what model it holds is taken to hold the other's.

    Raises UserError for what is neither format. Where two Megatron checkpoints both do not say, they are compared under
    Megatron's names.
    """
    readers = _reader(one), _reader(other)
    told = [_told(reader) if isinstance(reader, TorchDistReader) else None for reader in readers]
    sides: list[Side] = []
    for reader, own, neighbour, borrowed in zip(readers, told, readers[::-1], told[::-1], strict=True):
        if isinstance(reader, HuggingFaceReader):
            sides.append(huggingface_side(reader))
        elif origin := own or _borrowed(neighbour, borrowed):
            sides.append(megatron_side(reader, origin))
        else:
            sides.append(_native(reader))
    return sides[0], sides[1]


def _reader(folder: Folder) -> HuggingFaceReader | TorchDistReader:
    return HuggingFaceReader(folder, any_dtype=True) if detect(folder) is not Format.TORCH_DIST else TorchDistReader(folder)


def _told(reader: TorchDistReader) -> Reference | None:
    """What a checkpoint says of its model, if it says anything."""
    try:
        return reference.find(reader, None)
    except UnknownModelError:
        return None


def _borrowed(neighbour: HuggingFaceReader | TorchDistReader, told: Reference | None) -> Reference | None:
    """The model of the other side, without what travels with it."""
    if isinstance(neighbour, HuggingFaceReader):
        return Reference(read_json(neighbour.folder, CONFIG), f"`{neighbour.folder.label}`'s")
    return Reference(told.config, f"`{neighbour.folder.label}`'s") if told else None


class InRows:
    """A reader whose tensors without dimensions are seen as one row of one number."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.specs = {name: spec if spec.shape else _one_row(spec) for name, spec in reader.specs.items()}

    def read(self, name: str, region: Region, out: Array) -> None:
        if self._reader.specs[name].shape:
            self._reader.read(name, region, out)
        else:
            self._reader.read(name, (), out.reshape(()))

    def close(self) -> None:
        self._reader.close()


def _one_row(spec: TensorSpec) -> TensorSpec:
    return ViewSpec(spec.name, (1,), spec.dtype, spec.stored_shape, spec.stored_dtype)


def huggingface_side(reader: HuggingFaceReader) -> Side:
    """Tensors as they are; tied ones can be asked for where `config.json` is of a supported family."""
    rows = InRows(reader)
    makings = as_stored(rows.specs)
    config = read_json(reader.folder, CONFIG) if reader.folder.has(CONFIG) else {}
    if config.get("model_type") not in families.names():
        return Side(reader.folder.label, rows, makings)
    family = families.find(config["model_type"])
    model = make_model(family.CONFIG, config)
    return Side(reader.folder.label, rows, makings, tied=tied(makings.values(), family, model))


def megatron_side(reader: TorchDistReader, origin: Reference, *, zero: Mapping[str, int] | None = None) -> Side:
    """What an export would write; `zero` are rows that must be zero besides."""
    family = families.find(origin.config.get("model_type"))
    model = make_model(family.CONFIG, origin.config)
    plan = to_huggingface(family.RULES, model, reader.specs, dtype="keep")
    reader.check()
    makings, extras = with_carried(plan.makings, family, model, origin)
    return Side(
        reader.folder.label,
        Joined(reader, *extras),
        {making.spec.name: making for making in makings},
        tied=tied(plan.makings, family, model),
        zero={**dict.fromkeys(plan.zero, 0), **(zero or {})},
    )


def with_carried(
    makings: Sequence[Making], family: Family, model: Model, origin: Reference
) -> tuple[list[Making], list[HuggingFaceReader]]:
    """The makings, and those of tensors the source had that Megatron has not: a tied output layer, and extras; with the
    readers that extras come from."""
    again = [
        making
        for name, making in tied(makings, family, model).items()
        if any(name in shard.tensors for shard in origin.shards.values())
    ]
    if origin.extras is None:
        return [*makings, *again], []
    reader = HuggingFaceReader(origin.extras.folder, files=[origin.extras.name])
    return [*makings, *again, *_untouched(reader, family, model)], [reader]


def _untouched(reader: HuggingFaceReader, family: Family, model: Model) -> Iterable[Making]:
    """Extras as they are. A file that was tampered with must not put other tensors in the place of weights."""
    known = {fill(template, layer) for template in family.EXTRAS for layer in range(model.layers)}
    for spec in reader.specs.values():
        if spec.name not in known or not spec.shape:
            raise UserError(f"`{EXTRAS}` holds `{spec.name}` of shape {list(spec.shape)}, for which this family has no place")
    return as_stored(reader.specs).values()


def tied(makings: Iterable[Making], family: Family, model: Model) -> dict[str, Making]:
    """Tensors that a Hugging Face model may hold a second time, made of those they equal."""
    rules = [rule for rule in family.RULES if rule.same_as and not rule.when(model)]
    equal = {rule.same_as for rule in rules}
    made = {making.spec.name: making for making in makings if making.spec.name in equal}
    return {
        name: replace(made[rule.same_as], spec=replace(made[rule.same_as].spec, name=name))
        for rule in rules
        if rule.same_as in made
        for name in rule.names(0)[1]
    }


def _native(reader: TorchDistReader) -> Side:
    reader.check()
    rows = InRows(reader)
    return Side(reader.folder.label, rows, as_stored(rows.specs))


def check_dimensions(specs: Mapping[str, TensorSpec]) -> None:
    """Raise UserError for a tensor without rows: nothing here could say which of them go where."""
    for name, spec in specs.items():
        if not spec.shape:
            raise UserError(f"`{name}` has no dimensions, which is not supported")
