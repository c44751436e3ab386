"""Any directory as a side of a comparison: what it holds under Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping

from converter import families, reference
from converter.carried import CONFIG, Reference
from converter.config import make_model
from converter.exporting import tied, with_carried
from converter.inspect import HUGGINGFACE, kind
from converter.plan import as_stored, to_huggingface
from converter.verify import Side
from formats.errors import UserError
from formats.folder import Folder
from formats.huggingface import HuggingFaceReader
from formats.json_objects import read_json
from formats.spec import Joined, TensorSpec
from formats.torch_dist import TorchDistReader


def open_sides(one: Folder, other: Folder) -> tuple[Side, Side]:
    """Both directories. One that does not say what model it holds is taken to hold the other's.

    Raises UserError for what is neither format. Where two Megatron checkpoints both do not say, they are compared under
    Megatron's names.
    """
    if kind(one) == kind(other) != HUGGINGFACE and not any(_told(folder) for folder in (one, other)):
        return _native(one), _native(other)
    return open_side(one, model_of=other), open_side(other, model_of=one)


def open_side(folder: Folder, *, model_of: Folder | None = None) -> Side:
    """One directory. `model_of` is asked for the model where the directory itself does not tell."""
    if kind(folder) == HUGGINGFACE:
        return huggingface_side(HuggingFaceReader(folder))
    reader = TorchDistReader(folder)
    return megatron_side(reader, _reference(reader, model_of))


def huggingface_side(reader: HuggingFaceReader) -> Side:
    """Tensors as they are; tied ones can be asked for where `config.json` is of a supported family."""
    for name, spec in reader.specs.items():
        if not spec.shape:
            raise UserError(f"`{name}` has no dimensions, which is not supported")
    makings = as_stored(reader.specs)
    if not reader.folder.has(CONFIG):
        return Side(reader.folder.label, reader, makings)
    config = read_json(reader.folder, CONFIG)
    if config.get("model_type") not in families.names():
        return Side(reader.folder.label, reader, makings)
    family = families.find(config["model_type"])
    model = make_model(family.CONFIG, config)
    return Side(reader.folder.label, reader, makings, tied=tied(makings.values(), family, model))


def megatron_side(reader: TorchDistReader, origin: Reference, *, zero: Mapping[str, int] | None = None) -> Side:
    """What an export would write; `zero` are rows that must be zero besides."""
    family = families.find(origin.config.get("model_type"))
    model = make_model(family.CONFIG, origin.config)
    plan = to_huggingface(family.RULES, model, reader.specs, dtype="keep")
    reader.check(one.megatron for one in plan.bound)
    makings, extras = with_carried(plan.makings, family, model, origin)
    return Side(
        reader.folder.label,
        Joined(reader, *extras),
        {making.spec.name: making for making in makings},
        tied=tied(plan.makings, family, model),
        zero={**dict.fromkeys(plan.zero, 0), **(zero or {})},
    )


def _reference(reader: TorchDistReader, model_of: Folder | None) -> Reference:
    try:
        return reference.find(reader, None)
    except UserError:
        if model_of is None:
            raise
        if kind(model_of) == HUGGINGFACE:
            return Reference(read_json(model_of, CONFIG), f"`{model_of.label}`'s")
        return Reference(reference.find(TorchDistReader(model_of), None).config, f"`{model_of.label}`'s")


def _told(folder: Folder) -> bool:
    try:
        reference.find(TorchDistReader(folder), None)
    except UserError:
        return False
    return True


def _native(folder: Folder) -> Side:
    reader = TorchDistReader(folder)
    specs: Mapping[str, TensorSpec] = reader.specs
    reader.check(specs)
    return Side(reader.folder.label, reader, as_stored({name: spec for name, spec in specs.items() if spec.shape}))
