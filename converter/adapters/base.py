"""The model that an adapter is merged into, opened: whichever way it is kept, it is read under Hugging Face names.

So merging needs no code for fused tensors: a Megatron checkpoint is split by the row table that exports it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from converter import families, reference
from converter.config import make_model
from converter.exporting import megatron_source
from converter.importing import huggingface_source
from converter.plan import Piece, TensorPlan, check_dtypes
from converter.recognize import refuse_unfit
from converter.rules import tied_names
from converter.run import check_filled
from converter.sources import Source
from converter.views import check_dimensions, megatron_view
from formats.detect import Format, detect, open_megatron
from formats.errors import UserError
from formats.folder import Folder
from formats.huggingface import HuggingFaceReader
from formats.spec import Array, Reader, Region


class PlannedReader:
    """Tensors that are made of another reader's; none is cast, and copies cover each."""

    def __init__(self, reader: Reader, tensor_plans: Mapping[str, TensorPlan]) -> None:
        self._reader, self._makings = reader, tensor_plans
        self.specs = {name: tensor_plan.spec for name, tensor_plan in tensor_plans.items()}

    def read(self, name: str, region: Region, out: Array) -> None:
        for copy, there, rows in Piece(self._makings[name], region).copies():
            self._reader.read(copy.source, there, out[rows])

    def close(self) -> None:
        self._reader.close()


def open_base(folder: Folder, given: Folder | None) -> Source:
    """A model in either format; `given` is a folder with a `config.json` for a checkpoint that carries none.

    Raises UserError for what is neither format, or no model.
    """
    if detect(folder) is not Format.TORCH_DIST:
        if given:
            raise UserError("`--hf-config` is for a Megatron checkpoint", hint=f"`{folder.label}` has its own `config.json`")
        reader = HuggingFaceReader(folder, any_dtype=True)
        source = huggingface_source(reader)
        _check_names(source)
        check_dtypes(reader.specs)
        check_dimensions(reader.specs)
        return source
    checkpoint = open_megatron(folder)
    origin = reference.find(checkpoint, given)
    side = megatron_view(checkpoint, origin)
    for name in side.zero:
        check_filled(checkpoint, name, 0)
    for name, value in side.filled.items():
        check_filled(checkpoint, name, value)
    return megatron_source(checkpoint, folder, origin, PlannedReader(side.reader, side.tensor_plans))


def _check_names(source: Source) -> None:
    """Raise UserError for weights that are recognized as no plain ones of their family, where it is supported."""
    config = source.reference.config
    if config.get("model_type") in families.names():
        family = families.find(config["model_type"])
        refuse_unfit(source.reader.specs, config, family, make_model(family.CONFIG, config), label=source.label)


def check_ties(source: Source, names: Collection[str]) -> None:
    """Raise UserError if only one use of a tensor that the model uses twice would change."""
    config = source.reference.config
    for name, other in _ties(config):
        changed = sorted({name, other} & set(names))
        if changed:
            raise UserError(
                f"the adapter changes `{changed[0]}`, but `config.json` ties `{name}` to `{other}`: one tensor for two uses",
                hint="untie the base first: store both, and set `tie_word_embeddings` to false in its `config.json`",
            )


def _ties(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of names that stand for one tensor, where the family is known."""
    if config.get("model_type") not in families.names():
        return []
    family = families.find(config["model_type"])
    model = make_model(family.CONFIG, config)
    return [*tied_names(family.RULES, model).items()]
